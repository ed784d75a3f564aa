"""Which pairs of times a flow map is trained at: t, where it starts, and s <= t, where it arrives.

A law maps uniform numbers to times, so that they are as reproducible as their noise. float64, elementwise.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import require


class TimePairs(Protocol):
    """A distribution of 1 >= t >= s >= 0."""

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s), each (n,), of uniform numbers u, float64 (n, 3) in (0, 1)."""
        ...


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(N(mean, std^2)) by its inverse CDF."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


@dataclass(frozen=True)
class DistanceTimes:
    """The distance t - s is logit-normal, its place uniform (Align Your Flow, algorithm 1).

    (P_mean, P_std) = (-0.8, 1.0) and (-0.6, 1.6) are reported, for which resolution is unknown: sweep them.
    """

    mean: float = -0.8
    std: float = 1.0

    def __post_init__(self) -> None:
        require(self.std > 0, "flow_map.times.std", self.std, "a number > 0")

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """d = sigmoid(N(mean, std^2)), s ~ U[0, 1 - d], t = s + d."""
        d = logit_normal(u[:, 0], self.mean, self.std)
        s = u[:, 1] * (1 - d)
        return s + d, s


@dataclass(frozen=True)
class SortedTimes:
    """Two logit-normal times, the larger one t; a share of the samples has s = t: flow matching (MeanFlow, arXiv 2505.13447)."""

    mean: float = -0.4
    std: float = 1.0
    share_equal: float = 0.75

    def __post_init__(self) -> None:
        require(self.std > 0, "flow_map.times.std", self.std, "a number > 0")
        require(0 <= self.share_equal <= 1, "flow_map.times.share_equal", self.share_equal, "must lie in [0, 1]")

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(max, min) of two draws; (t, t) where the third number is below `share_equal`."""
        low, high = logit_normal(u[:, :2], self.mean, self.std).sort(dim=1).values.unbind(1)
        return high, torch.where(u[:, 2] < self.share_equal, high, low)


@dataclass(frozen=True)
class ToData:
    """s = 0: a consistency model, which jumps to data only (sCM, arXiv 2410.11081); t is logit-normal."""

    mean: float = -0.8
    std: float = 1.6

    def __post_init__(self) -> None:
        require(self.std > 0, "flow_map.times.std", self.std, "a number > 0")

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, 0)."""
        t = logit_normal(u[:, 0], self.mean, self.std)
        return t, torch.zeros_like(t)
