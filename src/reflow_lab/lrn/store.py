"""The pair store: what a ReFlow is trained on, on disk, with where it came from.

Only what cannot be derived is stored. A backward pair's noise is regenerated from seed and index, a forward pair's image is
found in the data set; so a shard (`reflow_lab.shards`) holds one half of its pairs, x0 or x1, and the manifest says which.
It also has classes and check values of the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import filling
from ..artifacts import Artifact
from ..data.sets import SampleSet
from ..errors import UserError, bad_value
from ..filling import Draw
from ..noise import Indices, normal, uniform
from ..shards import ShardStore, read_manifest
from .couplings import Batch

STREAM = "pairs"  #: the noise stream of backward pairs
KEYS = {"kind", "half", "num_classes", "seed", "flips", "noise_check"}  #: of the manifest, beside those of any store


def pair_noise(seed: int, indices: Indices, shape: tuple[int, ...]) -> Tensor:
    """x1 of backward pairs, float32 (n, *shape)."""
    return normal(seed, STREAM, indices, shape)


def pair_labels(seed: int, indices: Indices, num_classes: int) -> Tensor | None:
    """Class labels of backward pairs, int64 (n,), uniform; None for an unconditional teacher."""
    if not num_classes:
        return None
    return (uniform(seed, f"{STREAM}/labels", indices)[:, 0] * num_classes).long()


def pair_images(images: SampleSet, indices: Indices, flips: bool) -> tuple[Tensor, Tensor | None]:
    """x0 of forward pairs, float32 (n, *shape), with labels (n,) or None: pair i is image i modulo their number.

    With `flips` every second pass over the images is mirrored, left to right.
    """
    x0, label = images.take(indices % len(images))
    if flips:
        mirrored = torch.from_numpy(indices // len(images) % 2 == 1).to(x0.device)
        x0[mirrored] = x0[mirrored].flip(-1)
    return x0, label


def noise_check(seed: int, shape: tuple[int, ...], count: int) -> list[float]:
    """Values of the first, the middle and the last pair, by which a machine that would regenerate other noise is found out."""
    return [float(v) for v in pair_noise(seed, np.array([0, count // 2, count - 1]), shape).flatten(1)[:, :4].flatten()]


def own_check(about: dict[str, Any]) -> list[float]:
    """`noise_check` of a recipe or manifest."""
    return noise_check(about["seed"], tuple(about["shape"]), about["count"])


def fill(made: Artifact, draw: Draw, conditions: dict[str, Any], numbers: Sequence[int] | None = None) -> bool:
    """Draw what is missing of a pair store (or of its shards `numbers`), and finish it if all is there; whether it is.

    draw: of pairs, their stored half. See `filling.fill`.
    """
    recipe = made.recipe
    check = own_check(recipe) if recipe["half"] == "x0" else None
    what = f"{recipe['kind']} pairs"
    return filling.fill(made, draw, conditions, unit="pairs", what=what, numbers=numbers, more={"noise_check": check})


@dataclass(frozen=True)
class PairStore(ShardStore):
    """Random access to a folder of pairs; `images` is the data set's training split, which forward pairs refer to.

    What is `stored` is x0 of backward pairs, x1 of forward ones. Batches come where `images` lie, on the CPU without them.
    """

    images: SampleSet | None = None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, origin and shards; checked against this machine's noise."""
        manifest = read_manifest(self.folder, KEYS)
        if (check := manifest["noise_check"]) and not np.allclose(check, own_check(manifest), rtol=1e-5):
            other = "this machine regenerates other noise than the store was made with; delete it to make it again"
            raise UserError(f"{self.folder}: {other}")
        return manifest

    @property
    def kind(self) -> str:
        """`backward`, `forward` or `projected`."""
        return str(self.manifest["kind"])

    def labels(self, indices: Indices) -> Tensor | None:
        """The classes of these pairs, int64 (n,), or None: by seed and index, or those of the images."""
        about = self.manifest
        if about["half"] == "x0" or not about["num_classes"]:
            return pair_labels(about["seed"], indices, about["num_classes"])
        labels = self._images().labels
        return None if labels is None else labels[torch.from_numpy(indices % len(labels)).to(labels.device)]

    def derived(self, indices: Indices) -> Tensor:
        """The other half, float32 (n, *shape): noise by seed and index, or images of the data set."""
        about = self.manifest
        if about["half"] == "x0":
            return pair_noise(about["seed"], indices, tuple(about["shape"]))
        return pair_images(self._images(), indices, about["flips"])[0]

    def _images(self) -> SampleSet:
        if self.images is None:
            raise bad_value("images", None, "forward pairs refer to the data set they were made from")
        return self.images

    def read(self, indices: Indices, position: int = 0) -> Batch:
        """The pairs of these indices (n,), where the images lie; `position` is unused, since stored pairs are fixed."""
        stored, derived, label = self.stored(indices), self.derived(indices), self.labels(indices)
        x0, x1 = (stored, derived) if self.manifest["half"] == "x0" else (derived, stored)
        return Batch(x0, x1, label).to(torch.device("cpu") if self.images is None else self.images.device)
