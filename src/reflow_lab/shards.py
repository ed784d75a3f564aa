"""Stores of shards: rows of one shape on the disk, a few thousand a file, mapped into memory and read at random.

Pair stores (`lrn.store`) and what is measured of samples (`evaluation.vectors`) are such; `filling` writes them.

    manifest.json     recipe, how and where it was made, shards with count and SHA-256, and what the kind of store adds
    shard-00000.npy   (count, *shape), uint8, float16 or float32
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .artifacts import file_hash, read_json, remove_leftovers, write_atomically, write_json
from .data.sets import to_float, to_uint8
from .errors import UserError, require
from .noise import Indices

DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
KEYS = {"count", "shape", "dtype", "made_by", "shards"}  #: that every manifest has


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
    """Map one shard of `count` rows; a missing, truncated or foreign file is a user's error that names it."""
    try:
        shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or not a whole shard ({error}); delete {path.parent} to make it again") from None
    wanted = f"{count} of {shape} {dtype}"
    held = f"{len(shard)} of {shard.shape[1:]} {shard.dtype}"
    require(held == wanted, str(path), held, f"the manifest says {wanted}; delete {path.parent} to make it again")
    return np.asarray(shard)  # still mapped, but indexed without np.memmap's overhead


def write_manifest(folder: Path, about: dict[str, Any], made_by: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write `manifest.json`, the last file of a store: what it is, how it was made, its shards."""
    write_json(folder / "manifest.json", {**about, "made_by": made_by, "shards": shards})


def read_manifest(folder: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """Read `manifest.json`; raises a `UserError` for one that lacks KEYS or these."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or (missing := {*KEYS, *keys} - manifest.keys()):
        lacks = f" lacks {', '.join(sorted(missing))}" if isinstance(manifest, dict) else " is no object"
        raise UserError(f"{path}:{lacks}; delete {folder} to make it again")
    return manifest


@dataclass(frozen=True)
class Shards:
    """The files of a store: `count` rows of one shape and type, `size` a file."""

    folder: Path
    count: int
    size: int
    shape: tuple[int, ...]
    dtype: str
    unit: str  #: what a row is, in the plural, for people

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def indices(self, number: int) -> Indices:
        """The rows of a shard."""
        return np.arange(number * self.size, min((number + 1) * self.size, self.count))

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(number)

    def mark(self, number: int) -> Path:
        """A hidden file with the shard's SHA-256, written after it: without it the shard does not count."""
        return self.folder / f".{shard_name(number)}.sha256"

    def is_there(self, number: int) -> bool:
        """Whether a shard was written whole."""
        path, least = self.path(number), len(self.indices(number)) * self.bytes_per_row
        return self.mark(number).exists() and path.exists() and path.stat().st_size >= least

    @property
    def bytes_per_row(self) -> int:
        """On the disk."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    def damaged(self) -> list[int]:
        """The shards that are no longer what their marks say."""
        return [n for n in range(len(self)) if file_hash(self.path(n)) != self.mark(n).read_text()]

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [number for number in range(len(self)) if not self.is_there(number)]

    def num_rows(self, numbers: Sequence[int]) -> int:
        """How many rows these shards hold."""
        return sum(len(self.indices(number)) for number in numbers)

    def described(self) -> list[dict[str, Any]]:
        """File, count and checksum of every shard, for the manifest."""
        names = [(n, shard_name(n)) for n in range(len(self))]
        return [{"file": name, "count": len(self.indices(n)), "sha256": self.mark(n).read_text()} for n, name in names]

    def clean(self) -> None:
        """Remove what a finished store does not need; the marks stay, so that a damaged shard can be drawn again by itself."""
        remove_leftovers(self.folder, ".*.tmp")
        for path in self.folder.glob(".shard-*.lock"):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardStore:
    """Random access to a finished folder of rows."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, origin and shards."""
        return read_manifest(self.folder)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        shape, dtype = tuple(self.manifest["shape"]), self.manifest["dtype"]
        return [open_shard(self.folder / s["file"], s["count"], shape, dtype) for s in self.manifest["shards"]]

    @cached_property
    def _starts(self) -> Indices:
        return np.cumsum([0, *(len(s) for s in self._shards)])[:-1]

    def rows(self, indices: Indices) -> NDArray[Any]:
        """What the files hold at these indices, (n, *shape), as stored."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = np.empty((len(indices), *self._shards[0].shape[1:]), self._shards[0].dtype)
        order = np.argsort(shards, kind="stable")
        ends = np.flatnonzero(np.diff(shards[order])) + 1
        for where in np.split(order, ends) if len(order) else ():
            shard = shards[where[0]]
            rows[where] = self._shards[shard][indices[where] - self._starts[shard]]
        return rows

    def stored(self, indices: Indices) -> Tensor:
        """These rows, float32 (n, *shape)."""
        return decode(torch.from_numpy(self.rows(indices)))
