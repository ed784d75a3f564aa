"""What a data source is, and what the sources share: splits that never change, and errors of one line."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError, require
from ..noise import Indices, permutation
from .sets import ImageSet, SampleSet

if TYPE_CHECKING:
    from .autoencoder import Codec

SPLITS = ("train", "reference", "floor")  #: to learn from; to measure against; real samples measured like generated ones
SPLIT_SEED = 0  #: splits belong to the data, not to a run: no configuration changes them


class DataSource(Protocol):
    """A data set with named splits, read at first use and kept. Constructors touch no disk."""

    @property
    def channels(self) -> int:
        """Channels of an image; of a point, its dimension."""
        ...

    @property
    def resolution(self) -> int:
        """Height and width of an image; of a point, 1."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; 0: unlabelled."""
        ...

    def split(self, name: str) -> SampleSet:
        """The split `train`, `reference` or `floor`."""
        ...


@runtime_checkable
class Encoded(DataSource, Protocol):
    """A data set whose samples are latents of images; its reference split holds images."""

    @property
    def codec(self) -> "Codec":
        """How latents become images."""
        ...

    def decode(self, samples: Tensor) -> Tensor:
        """Latents as images in [-1, 1]; images stay."""
        ...


def decoded(source: DataSource, samples: Tensor) -> Tensor:
    """Samples as they are looked at and measured: latents as images, whatever else as it is."""
    return source.decode(samples) if isinstance(source, Encoded) else samples


def decoder(source: DataSource) -> Callable[[Tensor], Tensor]:
    """`decoded` of a source; an autoencoder is loaded now, so that one which cannot be is told before any work."""
    if isinstance(source, Encoded):
        source.codec.model()
    return partial(decoded, source)


def has_pixels(source: DataSource) -> bool:
    """Whether what a network learns are images themselves: they can be mirrored, augmented and kept as bytes."""
    return isinstance(source.split("train"), ImageSet)


def require_split(name: str) -> None:
    """Raise a `UserError` unless `name` is one of SPLITS."""
    require(name in SPLITS, "split", name, f"must be one of {', '.join(SPLITS)}")


def require_facts(data: str, given: dict[str, int], facts: dict[str, int]) -> None:
    """Raise a `UserError` if a configuration contradicts what a data set is: facts are keys only for others to interpolate."""
    for key, value in facts.items():
        require(given[key] == value, f"data.{key}", given[key], f"{data} has {value}")


def require_room(folder: Path, num_bytes: int, key: str, what: str) -> None:
    """Raise a `UserError` that names `key` unless the disk under a folder has so many bytes to spare."""
    free = shutil.disk_usage(folder).free
    room = f"{num_bytes / 1e9:.3g} GB are needed {what}, {free / 1e9:.3g} GB are free; name another place"
    require(num_bytes < free, key, folder, room)


def partition(strata: NDArray[np.int64], fractions: Sequence[float], stream: str) -> list[Indices]:
    """Cut range(len(strata)) into disjoint parts that hold the given fractions of every stratum (rounded down at each cut).

    Each part is in random order, strata mixed; all is a function of `stream` and the strata alone.
    """
    order = permutation(SPLIT_SEED, stream, len(strata))
    cuts = np.cumsum(fractions)[:-1]
    part = np.empty(len(strata), np.int64)
    for stratum in np.unique(strata):
        members = order[strata[order] == stratum]
        ends = np.floor(cuts * len(members) + 1e-9)
        part[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return [_shuffled(np.flatnonzero(part == number), f"{stream}/part{number}") for number in range(len(fractions))]


def _shuffled(indices: Indices, stream: str) -> Indices:
    return indices[permutation(SPLIT_SEED, stream, len(indices))]


@contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on foreign bytes into a one-line `UserError` that says where they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: not a readable {what} ({reason})") from error
