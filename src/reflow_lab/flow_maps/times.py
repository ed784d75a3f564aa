"""Which pairs of times a flow map is trained at: t, where it starts, and s <= t, where it arrives.

Built from the laws of a single time (dyn/times.py), each maps uniform numbers to times, so that they are as reproducible as
their noise. float64, elementwise.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..dyn.times import TimeLaw
from ..errors import require


class TimePairs(Protocol):
    """A distribution of 1 >= t >= s >= 0."""

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s), each (n,), of uniform numbers u, float64 (n, 3) in (0, 1)."""
        ...


@dataclass(frozen=True)
class DistanceTimes:
    """A law of the distance t - s, whose place is uniform (Align Your Flow, algorithm 1: logit-normal).

    (P_mean, P_std) = (-0.8, 1.0) and (-0.6, 1.6) are reported, for which resolution is unknown: sweep them. A share may have
    s = t as in `SortedTimes` (ours; the paper's is 0): flow matching, without which short trainings were seen to diverge.
    """

    distance: TimeLaw
    share_equal: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.share_equal <= 1, "flow_map.times.share_equal", self.share_equal, "must lie in [0, 1]")

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """d ~ distance, or 0 where the third number is below `share_equal`; s ~ U[0, 1 - d], t = s + d."""
        d = self.distance.quantile(u[:, 0])
        d = torch.where(u[:, 2] < self.share_equal, 0.0, d)
        s = u[:, 1] * (1 - d)
        return s + d, s


@dataclass(frozen=True)
class SortedTimes:
    """Two times of one law, the larger one t; a share of the samples has s = t: flow matching (MeanFlow, arXiv 2505.13447).

    The law of a time is logit-normal there.
    """

    time: TimeLaw
    share_equal: float = 0.75

    def __post_init__(self) -> None:
        require(0 <= self.share_equal <= 1, "flow_map.times.share_equal", self.share_equal, "must lie in [0, 1]")

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(max, min) of two draws; (t, t) where the third number is below `share_equal`."""
        low, high = self.time.quantile(u[:, :2]).sort(dim=1).values.unbind(1)
        return high, torch.where(u[:, 2] < self.share_equal, high, low)


@dataclass(frozen=True)
class ToData:
    """s = 0: a consistency model, which jumps to data only (sCM, arXiv 2410.11081)."""

    time: TimeLaw

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, 0)."""
        t = self.time.quantile(u[:, 0])
        return t, torch.zeros_like(t)
