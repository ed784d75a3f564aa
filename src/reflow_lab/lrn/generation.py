"""Filling a store shard by shard, by any number of processes.

A process takes a shard by its lock, draws it and renames it into place; a lock of a dead process is free, so whoever comes
next draws that shard again. The bytes of a shard are a function of the recipe, the kind of device and, on the CPU, the number of
threads, which the first process records and the others adopt: who draws a shard, and in which order, does not show.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import reflow_lab

from ..artifacts import Artifact, DiskFull, file_hash, lock, read_json, remove_leftovers, write_atomically, write_json
from ..errors import UserError, require
from ..noise import Indices
from ..parallel import rank, world_size
from ..progress import Bar
from .store import DTYPES, encode, shard_name, write_manifest, write_shard

T = TypeVar("T")
Draw = Callable[[Indices], Iterator[Tensor]]  #: of pairs, their stored half, (m, *shape) at a time, in order
POLL_S = 0.5  #: how often we look whether another process has finished its shards


@dataclass(frozen=True)
class Shards:
    """The files of a store: `count` pairs of one shape and type, `size` a file."""

    folder: Path
    count: int
    size: int
    shape: tuple[int, ...]
    dtype: str
    unit: str = "pairs"  #: what they hold, for people

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def indices(self, number: int) -> Indices:
        """The pairs of a shard."""
        return np.arange(number * self.size, min((number + 1) * self.size, self.count))

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(number)

    def mark(self, number: int) -> Path:
        """A hidden file with the shard's SHA-256, written after it: without it the shard does not count."""
        return self.folder / f".{shard_name(number)}.sha256"

    def is_there(self, number: int) -> bool:
        """Whether a shard was written whole."""
        path, least = self.path(number), len(self.indices(number)) * self.bytes_per_pair
        return self.mark(number).exists() and path.exists() and path.stat().st_size >= least

    @property
    def bytes_per_pair(self) -> int:
        """Of the stored half."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    def damaged(self) -> list[int]:
        """The shards that are no longer what their marks say."""
        return [n for n in range(len(self)) if file_hash(self.path(n)) != self.mark(n).read_text()]

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [number for number in range(len(self)) if not self.is_there(number)]

    def num_pairs(self, numbers: Sequence[int]) -> int:
        """How many pairs these shards hold."""
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


def fill(
    made: Artifact,
    draw: Draw,
    conditions: dict[str, Any],
    numbers: Sequence[int] | None = None,
    unit: str = "pairs",
    what: str | None = None,
) -> bool:
    """Draw what is missing of a store (or of its shards `numbers`), and finish it if all is there; whether it is.

    Several processes may do this at once. unit, what: what is drawn, for people. Raises a `UserError` if the disk lacks room, or
    if the store was begun under other conditions: the device type changes the bytes.
    """
    recipe = made.recipe
    shards = Shards(made.folder, recipe["count"], recipe["shard_size"], tuple(recipe["shape"]), recipe["dtype"], unit)
    with made.locked():
        if made.is_done():
            shards.clean()
            return True
        require_room(shards)
        made.begin()
        agreed = agree(made.folder, conditions)
    with threads(agreed["threads"]):
        work(shards, draw, what or f"{recipe['kind']} {unit}", list(numbers if numbers is not None else range(len(shards))))
        while not shards.missing():
            with made.locked():
                if made.is_done() or finished(made, shards, agreed):
                    shards.clean()
                    return True
            work(shards, draw, what or f"{recipe['kind']} {unit}", shards.missing())
    return False


def finished(made: Artifact, shards: Shards, agreed: dict[str, Any]) -> bool:
    """Write manifest and done-mark, unless a shard was damaged since it was drawn: then it no longer counts."""
    if damaged := shards.damaged():
        names = ", ".join(shard_name(n) for n in damaged[:5])
        print(f"{made.folder}: {names} changed since drawn; drawn again", file=sys.stderr)
        for number in damaged:
            shards.mark(number).unlink()
        return False
    described = shards.described()
    write_manifest(made.folder, made.recipe, agreed, described)
    made.finish({shard["file"]: shard["sha256"] for shard in described})
    return True


def agree(folder: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions under which a store is made: the first process's, if they are such that ours would give the same bytes."""
    path = folder / "made_by.json"
    if not path.exists():
        write_json(path, conditions)
        return conditions
    found: dict[str, Any] = read_json(path)
    device, ours = found["device"], conditions["device"]
    reason = f"{folder} was begun on {device}, this is {ours}: finish it there, or delete it"
    require(device == ours, "trainer.accelerator", "gpu" if ours == "cuda" else ours, reason)
    differing = [key for key in ("processor", "torch", "reflow_lab") if found[key] != conditions[key]]
    for key in differing:
        said = f"{folder}: begun with {key} {found[key]}, continued with {conditions[key]}: shards may differ in the last bits"
        print(said, file=sys.stderr)
    return found


def conditions(device: torch.device, **more: Any) -> dict[str, Any]:
    """What this process would make pairs with: device, GPU or instruction set, threads (which a GPU does not heed), versions."""
    on_cpu = device.type == "cpu"
    name = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device)
    own = {"device": device.type, "processor": name, "threads": torch.get_num_threads() if on_cpu else None}
    return {**own, "torch": torch.__version__, "reflow_lab": reflow_lab.__version__, **more}


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with this many threads (None: as many as there are): sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_room(shards: Shards) -> None:
    """Raise a `UserError` that says how much is needed if the disk cannot hold the missing shards."""
    needed, free = shards.num_pairs(shards.missing()) * shards.bytes_per_pair, shutil.disk_usage(shards.folder).free
    reason = f"{needed / 1e6:,.1f} MB are needed for the missing {shards.unit}, {free / 1e6:,.1f} MB are free on the disk"
    require(needed <= free, shards.unit, str(shards.folder), reason)


def work(shards: Shards, draw: Draw, what: str, numbers: list[int]) -> None:
    """Take one free shard after another, each process from another end, until others hold what is left; then wait for them."""
    first = rank() * len(numbers) // world_size()
    pending = [n for n in numbers[first:] + numbers[:first] if not shards.is_there(n)]
    total = shards.num_pairs(numbers)
    with Bar(what, total, shards.unit, total - shards.num_pairs(pending)) as bar:
        while pending:
            took = False
            for number in pending:
                took |= take(shards, number, draw, bar)
                there = total - shards.num_pairs([n for n in pending if not shards.is_there(n)])
                bar.advance(there - bar.completed)  # what others drew meanwhile
            pending = [n for n in pending if not shards.is_there(n)]
            if pending and not took:
                time.sleep(POLL_S)


def take(shards: Shards, number: int, draw: Draw, bar: Bar) -> bool:
    """Draw a shard, unless it is there or another process has it; whether we did."""
    if shards.is_there(number):
        return False
    with lock(shards.folder / f".{shard_name(number)}.lock", wait=False) as mine:
        if not mine or shards.is_there(number):
            return False
        remove_leftovers(shards.folder, f".*{shard_name(number)}*.tmp")
        write(shards, number, draw, bar)
    return True


def write(shards: Shards, number: int, draw: Draw, bar: Bar) -> None:
    """Draw a shard into its file, batch by batch, then write its mark."""
    indices = shards.indices(number)
    drawn = encoded(shards, indices, draw)

    def counted() -> Iterator[Tensor]:
        for stored in ahead(drawn) if torch.cuda.is_available() else drawn:  # on a GPU the next batch is drawn meanwhile
            yield stored
            bar.advance(len(stored))

    try:
        checksum = write_shard(shards.path(number), (len(indices), *shards.shape), shards.dtype, counted())
        write_atomically(shards.mark(number), lambda p: p.write_text(checksum))
    except DiskFull as error:
        left = shards.num_pairs(shards.missing()) * shards.bytes_per_pair
        raise UserError(f"{error}; {left / 1e6:,.1f} MB are needed for the missing {shards.unit}") from None


def encoded(shards: Shards, indices: Indices, draw: Draw) -> Iterator[Tensor]:
    """What is stored of these pairs, on the CPU, batch by batch; raises a `UserError` for NaN and infinity, rounded ones too."""
    at = 0
    for values in draw(indices):
        stored = encode(values, shards.dtype)
        if not (stored if stored.is_floating_point() else values).isfinite().all():
            where = f"among {shards.unit} {indices[at]} to {indices[at] + len(values) - 1}"
            raise UserError(f"{shards.folder}: NaN or infinite values {where}; no shard with them is written")
        at += len(values)
        yield stored.cpu()
    assert at == len(indices)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
