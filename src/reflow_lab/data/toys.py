"""Points in the plane, for runs of seconds: point i is a function of its own random bits, so neither file nor order matters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .. import gaussian
from ..errors import require
from ..noise import Indices, normal, uniform
from .sets import PointSet
from .sources import SPLIT_SEED, SPLITS, require_facts, require_split


class Toy(ABC):
    """A law of points, each of whose splits holds `num_points` draws that no other split shares."""

    num_points: int
    dim: int
    num_classes: int

    def __post_init__(self) -> None:
        positive = isinstance(self.num_points, int) and self.num_points > 0
        require(positive, "data.num_points", self.num_points, "must be a whole number, 1 or more")

    @property
    def channels(self) -> int:
        """A point is a vector of `dim` channels."""
        return self.dim

    @property
    def resolution(self) -> int:
        """A point has no width."""
        return 1

    @abstractmethod
    def draw(self, stream: str, indices: Indices) -> tuple[Tensor, Tensor | None]:
        """Points (n, dim) and labels (n,) or None, keyed by the stream and the indices."""

    def split(self, name: str) -> PointSet:
        """The split `train`, `reference` or `floor`: float32 (num_points, dim)."""
        require_split(name)
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, PointSet]:
        return {name: self._make(f"{type(self).__name__.lower()}/{name}") for name in SPLITS}

    def _make(self, stream: str) -> PointSet:
        points, labels = self.draw(f"data/{stream}", np.arange(self.num_points))
        return PointSet(points.float(), labels, stream, recipe=f"{self!r} {stream} seed {SPLIT_SEED}")


@dataclass
class Gaussian(Toy):
    """N(mean, std^2), independent in every coordinate; mean and std are numbers or lists of `dim` numbers, std > 0."""

    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 0.5
    num_points: int = 20_000
    dim: int = 2
    num_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.dim, int) and self.dim > 0, "data.dim", self.dim, "must be a whole number, 1 or more")
        require_facts("the Gaussian", vars(self), {"num_classes": 0})
        self.mean = _coordinates("data.mean", self.mean, self.dim)
        self.std = _coordinates("data.std", self.std, self.dim)
        require(min(self.std) > 0, "data.std", self.std, "must be positive")

    def closed_form(self, dtype: torch.dtype = torch.float64) -> gaussian.Gaussian:
        """The exact velocity, denoiser and flow map of this law."""
        return gaussian.Gaussian(torch.tensor(self.mean, dtype=dtype), torch.tensor(self.std, dtype=dtype))

    def draw(self, stream: str, indices: Indices) -> tuple[Tensor, None]:
        """mean + std z."""
        z = normal(SPLIT_SEED, stream, indices, (self.dim,))
        return torch.tensor(self.mean) + torch.tensor(self.std) * z, None


@dataclass
class TwoMoons(Toy):
    """Two interlocking half circles of radius 1, centred, plus noise of standard deviation `noise`; the label is the moon."""

    noise: float = 0.05
    num_points: int = 20_000
    dim: int = 2
    num_classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        level = isinstance(self.noise, int | float) and self.noise >= 0
        require(level, "data.noise", self.noise, "must be 0 or more")
        require_facts("two moons", vars(self), {"dim": 2, "num_classes": 2})

    def draw(self, stream: str, indices: Indices) -> tuple[Tensor, Tensor]:
        """(cos a, sin a), a in (0, pi), or its half turn about the centre (1/2, 1/4), which becomes the origin."""
        angle, coin = uniform(SPLIT_SEED, stream, indices, 2).unbind(1)
        label = (coin > 0.5).long()
        upper = torch.stack(((torch.pi * angle).cos() - 0.5, (torch.pi * angle).sin() - 0.25), dim=1)
        clean = upper * (1 - 2 * label[:, None])
        return clean + self.noise * normal(SPLIT_SEED, f"{stream}/noise", indices, (2,)), label


@dataclass
class Checkerboard(Toy):
    """Uniform on the dark squares, those with i + j even, of a board of cells x cells on [-1, 1]^2; `cells` is even."""

    cells: int = 4
    num_points: int = 20_000
    dim: int = 2
    num_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        even = isinstance(self.cells, int) and self.cells > 0 and self.cells % 2 == 0
        require(even, "data.cells", self.cells, "must be an even number, 2 or more")
        require_facts("the checkerboard", vars(self), {"dim": 2, "num_classes": 0})

    def draw(self, stream: str, indices: Indices) -> tuple[Tensor, None]:
        """A uniform row position, and a uniform position on the dark half of that row."""
        u, v = uniform(SPLIT_SEED, stream, indices, 2).unbind(1)
        row, along = self.cells * u, self.cells / 2 * v
        column = 2 * along.floor() + row.floor() % 2 + along.frac()
        return 2 * torch.stack((column, row), dim=1) / self.cells - 1, None


def _coordinates(key: str, value: float | Sequence[float], dim: int) -> tuple[float, ...]:
    values = (value,) * dim if isinstance(value, int | float) else tuple(value)
    fits = len(values) == dim and all(isinstance(number, int | float) for number in values)
    require(fits, key, value, f"must be a number or a list of data.dim={dim} numbers")
    return tuple(map(float, values))
