"""How straight a flow is along t: where its paths turn, and how sharply."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..flow import T_MAX, MeanVelocity
from ..inf.grids import Uniform
from ..inf.solvers import Heun


class AlongTime(NamedTuple):
    """Of each path and bin of t, float64 (n, num_bins), per dimension; `t` (num_bins,) are the bins' centres.

    deviation: the mean square of velocity - chord, whose mean over the bins is Liu et al.'s straightness (arXiv 2209.03003).
    acceleration: the root mean square over dimensions of dv/dt along the path.
    """

    t: Tensor
    deviation: Tensor
    acceleration: Tensor


def nodes(num_bins: int, per_bin: int, t_max: float) -> Tensor:
    """The middles of num_bins * per_bin equal pieces of [0, t_max], from the upper end down, float64."""
    return Uniform()(num_bins * per_bin, t_max)[1:] + t_max / (2 * num_bins * per_bin)


def velocities(velocity: MeanVelocity, x1: Tensor, times: Tensor, t_max: float, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """v at descending times on the paths from noise x1, float64 (len(times), n, dim), and the chords, (n, dim).

    The paths are Heun's through these very times, one call of three for v itself.
    """
    found: list[Tensor] = []

    def look(step: int, t: float, x: Tensor) -> None:
        if step > 0:
            found.append(velocity(x, x.new_full((len(x),), t), label=label).flatten(1).double())

    with torch.inference_mode():
        grid = torch.cat((times.new_tensor([t_max]), times, times.new_zeros(1)))
        x0 = Heun()(velocity, t_max * x1, grid, label=label, callback=look)
    return torch.stack(found), (x1 - x0 / t_max).flatten(1).double()


def along_time(
    velocity: MeanVelocity,
    x1: Tensor,
    *,
    num_bins: int = 20,
    per_bin: int = 3,
    t_max: float = T_MAX,
    label: Tensor | None = None,
) -> AlongTime:
    """Deviation from the chord and acceleration by t on the paths from noise x1, (n, ...), on the CPU.

    per_bin >= 1 equally spaced points a bin, num_bins * per_bin >= 3 in all: three calls of the velocity each. Keeps all
    velocities: 8 bytes a dimension, point and path.
    """
    require(num_bins * per_bin >= 3, "per_bin", per_bin, "num_bins * per_bin must be at least 3")
    times = nodes(num_bins, per_bin, t_max)
    v, chord = velocities(velocity, x1, times, t_max, label)
    deviation = (v - chord).square().mean(2)
    (acceleration,) = torch.gradient(v, spacing=(times.to(v.device),), dim=0, edge_order=2)
    values = (deviation, acceleration.square().mean(2).sqrt())
    binned = [value.flip(0).reshape(num_bins, per_bin, -1).mean(1).mT.cpu() for value in values]
    return AlongTime(times.flip(0).reshape(num_bins, per_bin).mean(1), *binned)


def joined(parts: list[AlongTime]) -> AlongTime:
    """The paths of several batches together."""
    return AlongTime(parts[0].t, torch.cat([p.deviation for p in parts]), torch.cat([p.acceleration for p in parts]))
