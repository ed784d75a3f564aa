"""The pair store: what a ReFlow is trained on, on disk, with where it came from.

Only what cannot be derived is stored: a backward pair's image (its noise is regenerated from seed and index), a forward
pair's noise (its image is found in the data set).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifacts import file_hash, read_json, write_atomically, write_json
from ..data.sets import SampleSet, to_float, to_uint8
from ..errors import UserError, require
from ..noise import Indices, normal, uniform
from .couplings import Batch

DTYPES = {"uint8": np.uint8, "float16": np.float16, "float32": np.float32}
STREAM = "pairs"  #: the noise stream of backward pairs


def pair_noise(seed: int, indices: Indices, shape: tuple[int, ...]) -> Tensor:
    """x1 of backward pairs, float32 (n, *shape)."""
    return normal(seed, STREAM, indices, shape)


def pair_labels(seed: int, indices: Indices, num_classes: int) -> Tensor | None:
    """Class labels of backward pairs, int64 (n,), uniform; None for an unconditional teacher."""
    if not num_classes:
        return None
    return (uniform(seed, f"{STREAM}/labels", indices)[:, 0] * num_classes).long()


def noise_check(seed: int, shape: tuple[int, ...]) -> list[float]:
    """Values that show whether this machine regenerates the noise that the store was made with."""
    return [float(v) for v in pair_noise(seed, np.arange(1), shape).flatten()[:8]]


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.npy"


def write_shard(path: Path, values: Tensor, dtype: str) -> None:
    """Write one shard, (m, ...) floats in [-1, 1] (or noise), rounded to `dtype`; whole or not at all."""
    array = (to_uint8(values) if dtype == "uint8" else values).numpy().astype(DTYPES[dtype], copy=False)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(path, save)


def open_shard(path: Path, count: int) -> NDArray[Any]:
    """Map one shard of `count` pairs; a missing, truncated or foreign file is a user's error that names it."""
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or not a whole shard ({error}); make the pairs again") from None
    require(len(shard) == count, str(path), f"{len(shard)} pairs", f"the manifest says {count}; make the pairs again")
    return np.asarray(shard)  # still mapped, but indexed without np.memmap's overhead


def is_whole(path: Path, count: int, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a shard can be opened and holds `count` samples of this shape and type."""
    try:
        shard = open_shard(path, count)
    except UserError:
        return False
    return shard.shape == (count, *shape) and shard.dtype == DTYPES[dtype]


def write_manifest(folder: Path, provenance: dict[str, Any], counts: list[int]) -> None:
    """Write `manifest.json`: provenance, and for every shard its file, count and SHA-256."""
    names = [shard_name(i) for i in range(len(counts))]
    shards = [{"file": n, "count": c, "sha256": file_hash(folder / n)} for n, c in zip(names, counts, strict=True)]
    check = noise_check(provenance["seed"], tuple(provenance["shape"])) if provenance["kind"] == "backward" else None
    write_json(folder / "manifest.json", {**provenance, "shards": shards, "noise_check": check})


@dataclass(frozen=True)
class PairStore:
    """Random access to a folder of pairs; `images` is the data set's training split, which forward pairs refer to.

    Batches come where `images` lie, on the CPU without them.
    """

    folder: Path
    images: SampleSet | None = None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Provenance and shards; checked against this machine's noise."""
        manifest = read_json(self.folder / "manifest.json")
        if (check := manifest["noise_check"]) and not np.allclose(
            check, noise_check(manifest["seed"], tuple(manifest["shape"])), rtol=1e-5
        ):
            raise UserError(
                f"{self.folder}: this machine regenerates other noise than the store was made with; make the pairs again"
            )
        return manifest

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def kind(self) -> str:
        """`backward` or `forward`."""
        return str(self.manifest["kind"])

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        return [open_shard(self.folder / s["file"], s["count"]) for s in self.manifest["shards"]]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(s) for s in self._shards])[:-1].tolist()]

    def stored(self, indices: Indices) -> Tensor:
        """What the file holds for these pairs, float32 (n, *shape): x0 of backward pairs, x1 of forward ones."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self._shards[0].shape[1:]), self._shards[0].dtype)
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._shards[shard][indices[here] - self._starts[shard]]
        values = torch.from_numpy(rows)
        return to_float(values) if values.dtype == torch.uint8 else values.float()

    def read(self, indices: Indices, position: int = 0) -> Batch:
        """The pairs of these indices (n,), where the images lie; `position` is unused, since stored pairs are fixed."""
        values = self.stored(indices)
        device = torch.device("cpu") if self.images is None else self.images.held.device
        if self.kind == "backward":
            seed, shape = self.manifest["seed"], tuple(self.manifest["shape"])
            label = pair_labels(seed, indices, self.manifest["num_classes"])
            return Batch(values, pair_noise(seed, indices, shape), label).to(device)
        require(self.images is not None, "images", None, "forward pairs refer to the data set they were made from")
        assert self.images is not None
        x0, label = self.images.take(indices)
        return Batch(x0, values, label if self.manifest["num_classes"] else None).to(device)
