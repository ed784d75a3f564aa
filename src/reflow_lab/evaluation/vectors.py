"""What is known of each sample, its features first, on the disk: memory does not grow with their number, and all ranks take part.

Rows of float32 numbers, one a sample, in a store of shards (`reflow_lab.shards`), which any number of processes fill together:
a process takes a shard that nobody has, and after a kill or a ctrl-C only unfinished shards are drawn again.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import filling
from ..artifacts import Artifact, artifact
from ..noise import Indices
from ..shards import ShardStore

VERSION = 1  #: of the recipe: increment when the same configuration means another result
STAGE = "vectors"  #: the folder under outputs
SHARD = 1000  #: about so many samples a shard
CHUNK = 1024  #: samples read at a time


@dataclass(frozen=True)
class Vectors:
    """Some columns, `first` to `last`, of rows on the disk: float32 (n, last - first), read a chunk at a time."""

    store: ShardStore
    first: int
    last: int

    def __len__(self) -> int:
        return len(self.store)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d), as a tensor says it."""
        return len(self), self.last - self.first

    def __iter__(self) -> Iterator[Tensor]:
        """All rows in order, CHUNK at a time."""
        for begin in range(0, len(self), CHUNK):
            yield self.take(np.arange(begin, min(begin + CHUNK, len(self))))

    def take(self, indices: Indices) -> Tensor:
        """These rows."""
        return self.store.stored(indices)[:, self.first : self.last]

    def columns(self, first: int, last: int) -> "Vectors":
        """Some of the columns."""
        return Vectors(self.store, self.first + first, self.first + last)

    def all(self) -> Tensor:
        """All rows, in memory."""
        return torch.cat(list(self))


def plan(outputs: str | Path, count: int, width: int, batch_size: int, **of: Any) -> Artifact:
    """The artifact of `count` rows of `width` numbers; `of` says what they are, and batches do not straddle shards."""
    size = max(1, SHARD // batch_size) * batch_size
    return artifact(outputs, STAGE, VERSION, **of, count=count, shape=[width], shard_size=size, dtype="float32")


def fill(made: Artifact, draw: filling.Draw, device: torch.device, what: str) -> Vectors:
    """The rows, drawn first where they are missing, alone or with other processes; returns when all are there.

    draw: of indices, their rows, (m, width) at a time, in order. what: said beside the bar. Raises a `UserError` for NaN, and
    for a disk without room.
    """
    filling.fill(made, draw, filling.conditions(device), unit="samples", what=what)
    return Vectors(ShardStore(made.folder), 0, made.recipe["shape"][0])


@contextlib.contextmanager
def passing(made: Artifact, use: Path) -> Iterator[None]:
    """Rows that only the body needs: the last process to leave it well removes them. `use`: a file that stays."""
    use.parent.mkdir(parents=True, exist_ok=True)
    with use.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
        with contextlib.suppress(OSError):  # another process is still at it, and will remove them; or there are no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(made.folder, ignore_errors=True)
