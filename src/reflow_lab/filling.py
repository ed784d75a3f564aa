"""Filling a store of shards (`reflow_lab.shards`), by any number of processes.

A process takes a shard by its lock, draws it and renames it into place; a lock of a dead process is free, so whoever comes
next draws that shard again. The bytes of a shard are a function of the recipe, the kind of device and, on the CPU, the number of
threads, which the first process records and the others adopt: who draws a shard, and in which order, does not show.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

import reflow_lab

from .artifacts import Artifact, DiskFull, lock, read_json, remove_leftovers, write_atomically, write_json
from .errors import UserError, require
from .noise import Indices
from .parallel import rank, world_size
from .progress import Bar
from .shards import Shards, encode, shard_name, write_manifest, write_shard

T = TypeVar("T")
Draw = Callable[[Indices], Iterator[Tensor]]  #: of indices, their rows, (m, *shape) at a time, in order
POLL_S = 0.5  #: how often we look whether another process has finished its shards


def fill(
    made: Artifact,
    draw: Draw,
    conditions: dict[str, Any],
    *,
    unit: str,
    what: str,
    numbers: Sequence[int] | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Draw what is missing of a store (or of its shards `numbers`), and finish it if all is there; whether it is.

    Several processes may do this at once. The recipe has `count`, `shape`, `dtype` and `shard_size`; `more` goes into the
    manifest beside it. unit, what: what a row is, and what is drawn, for people. Raises a `UserError` if the disk lacks room,
    or if the store was begun under other conditions: the device type changes the bytes.
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
        work(shards, draw, what, list(numbers if numbers is not None else range(len(shards))))
        while not shards.missing():
            with made.locked():
                if made.is_done() or finished(made, shards, agreed, more):
                    shards.clean()
                    return True
            work(shards, draw, what, shards.missing())
    return False


def finished(made: Artifact, shards: Shards, agreed: dict[str, Any], more: Mapping[str, Any]) -> bool:
    """Write manifest and done-mark, unless a shard was damaged since it was drawn: then it no longer counts."""
    if damaged := shards.damaged():
        names = ", ".join(shard_name(n) for n in damaged[:5])
        print(f"{made.folder}: {names} changed since drawn; drawn again", file=sys.stderr)
        for number in damaged:
            shards.mark(number).unlink()
        return False
    described = shards.described()
    write_manifest(made.folder, {**made.recipe, **more}, agreed, described)
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
    """What this process would make rows with: device, GPU or instruction set, threads (which a GPU does not heed), versions."""
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
    needed, free = shards.num_rows(shards.missing()) * shards.bytes_per_row, shutil.disk_usage(shards.folder).free
    reason = f"{needed / 1e6:,.1f} MB are needed for the missing {shards.unit}, {free / 1e6:,.1f} MB are free on the disk"
    require(needed <= free, shards.unit, str(shards.folder), reason)


def work(shards: Shards, draw: Draw, what: str, numbers: list[int]) -> None:
    """Take one free shard after another, each process from another end, until others hold what is left; then wait for them."""
    first = rank() * len(numbers) // world_size()
    pending = [n for n in numbers[first:] + numbers[:first] if not shards.is_there(n)]
    total = shards.num_rows(numbers)
    with Bar(what, total, shards.unit, total - shards.num_rows(pending)) as bar:
        while pending:
            took = False
            for number in pending:
                took |= take(shards, number, draw, bar)
                there = total - shards.num_rows([n for n in pending if not shards.is_there(n)])
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
        left = shards.num_rows(shards.missing()) * shards.bytes_per_row
        raise UserError(f"{error}; {left / 1e6:,.1f} MB are needed for the missing {shards.unit}") from None


def encoded(shards: Shards, indices: Indices, draw: Draw) -> Iterator[Tensor]:
    """What is stored of these rows, on the CPU, batch by batch; raises a `UserError` for NaN and infinity, rounded ones too."""
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
