"""The pair store: what a ReFlow is trained on, on disk, with where it came from.

Only what cannot be derived is stored. A backward pair's noise is regenerated from seed and index, a forward pair's image is
found in the data set; so a shard holds one half of its pairs, x0 or x1, and the manifest says which.

    manifest.json     recipe, how and where it was made, classes, shards with count and SHA-256, check values of the noise
    shard-00000.npy   (count, *shape), uint8, float16 or float32, mapped into memory and read at random
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifacts import read_json, write_atomically, write_json
from ..data.sets import SampleSet, to_float, to_uint8
from ..errors import UserError, bad_value, require
from ..noise import Indices, normal, uniform
from .couplings import Batch

DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
STREAM = "pairs"  #: the noise stream of backward pairs
KEYS = {"kind", "half", "count", "shape", "num_classes", "seed", "dtype", "flips", "made_by", "shards", "noise_check"}


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


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.npy"


def encode(values: Tensor, dtype: str) -> Tensor:
    """Floats, in [-1, 1] for images, rounded to what is stored: uint8 clamps to the 256 grey levels."""
    return to_uint8(values) if dtype == "uint8" else values.to(DTYPES[dtype])


def decode(stored: Tensor) -> Tensor:
    """What is stored as float32: the inverse of `encode` up to rounding."""
    return to_float(stored) if stored.dtype == torch.uint8 else stored.float()


class Hashed:
    """A binary file that takes the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and take into account."""
        self.sha256.update(data)
        return self.file.write(data)


def write_shard(path: Path, shape: tuple[int, ...], dtype: str, parts: Iterable[Tensor]) -> str:
    """Write one shard of this shape, (count, ...), from its parts as they come, whole or not at all; its SHA-256.

    The parts are on the CPU and of the stored type. The checksum is taken from memory, not from the disk.
    """
    digests: list[str] = []
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            hashed = Hashed(file)
            np.lib.format.write_array_header_1_0(hashed, header)  # type: ignore[arg-type]
            for part in parts:
                hashed.write(part.contiguous().numpy().data)
        digests.append(hashed.sha256.hexdigest())

    write_atomically(path, save)
    return digests[0]


def open_shard(path: Path, count: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Map one shard of `count` pairs; a missing, truncated or foreign file is a user's error that names it."""
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or not a whole shard ({error}); make the pairs again") from None
    wanted = f"{count} of {shape} {dtype}"
    held = f"{len(shard)} of {shard.shape[1:]} {shard.dtype}"
    require(held == wanted, str(path), held, f"the manifest says {wanted}; make the pairs again")
    return np.asarray(shard)  # still mapped, but indexed without np.memmap's overhead


def write_manifest(folder: Path, recipe: dict[str, Any], made_by: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write `manifest.json`, the last file of a store: what it is, how it was made, its shards, check values of its noise."""
    check = own_check(recipe) if recipe["half"] == "x0" else None
    write_json(folder / "manifest.json", {**recipe, "made_by": made_by, "shards": shards, "noise_check": check})


@dataclass(frozen=True)
class PairStore:
    """Random access to a folder of pairs; `images` is the data set's training split, which forward pairs refer to.

    Batches come where `images` lie, on the CPU without them.
    """

    folder: Path
    images: SampleSet | None = None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, origin and shards; checked against this machine's noise."""
        manifest = read_json(self.folder / "manifest.json")
        if not isinstance(manifest, dict) or (missing := KEYS - manifest.keys()):
            lacks = f" lacks {', '.join(sorted(missing))}" if isinstance(manifest, dict) else " is no object"
            raise UserError(f"{self.folder / 'manifest.json'}:{lacks}; make the pairs again")
        if (check := manifest["noise_check"]) and not np.allclose(check, own_check(manifest), rtol=1e-5):
            other = "this machine regenerates other noise than the store was made with; make the pairs again"
            raise UserError(f"{self.folder}: {other}")
        return manifest

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def kind(self) -> str:
        """`backward`, `forward` or `projected`."""
        return str(self.manifest["kind"])

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        shape, dtype = tuple(self.manifest["shape"]), self.manifest["dtype"]
        return [open_shard(self.folder / s["file"], s["count"], shape, dtype) for s in self.manifest["shards"]]

    @cached_property
    def _starts(self) -> Indices:
        return np.cumsum([0, *(len(s) for s in self._shards)])[:-1]

    def rows(self, indices: Indices) -> NDArray[Any]:
        """What the files hold for these pairs, (n, *shape), as stored."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self._shards[0].shape[1:]), self._shards[0].dtype)
        order = np.argsort(shards, kind="stable")
        ends = np.flatnonzero(np.diff(shards[order])) + 1
        for where in np.split(order, ends) if len(order) else ():
            shard = shards[where[0]]
            rows[where] = self._shards[shard][indices[where] - self._starts[shard]]
        return rows

    def stored(self, indices: Indices) -> Tensor:
        """The stored half of these pairs, float32 (n, *shape): x0 of backward pairs, x1 of forward ones."""
        return decode(torch.from_numpy(self.rows(indices)))

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
