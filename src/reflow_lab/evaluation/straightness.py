"""How straight the trajectories of a flow are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow import T_MAX, MeanVelocity
from ..inf.grids import Grid
from ..inf.sampler import sample
from ..inf.solvers import Solver


class Trace:
    """A solver's callback that keeps the times and the states, (n, ...) each, before every step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, step: int, t: float, x: Tensor) -> None:
        """Keep one state."""
        self.times.append(t)
        self.states.append(x)


@torch.no_grad()
def straightness(states: Sequence[Tensor], times: Sequence[float]) -> Tensor:
    """Mean over steps of ||finite-difference velocity - chord||^2, per dimension: (n,), 0 for a straight line at constant speed.

    states: N + 1 of (n, ...) at `times`. The chord is (x_start - x_end) / (t_start - t_end), that is x(1) - x(0) for a whole
    trajectory. Steps weigh by their length, so that the value is the integral over t of Liu et al. 2022 on any grid (on the
    uniform one, the plain mean) and grids can be compared.
    """
    length = times[-1] - times[0]
    chord = (states[-1] - states[0]) / length
    total = torch.zeros_like(chord)
    for x, x_next, t, t_next in zip(states, states[1:], times, times[1:], strict=False):
        total += ((x_next - x) / (t_next - t) - chord).square() * ((t_next - t) / length)
    return total.flatten(1).mean(1)


def sample_straightness(
    velocity: MeanVelocity,
    x1: Tensor,
    *,
    solver: Solver,
    grid: Grid,
    nfe: int,
    t_max: float = T_MAX,
    label: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The images of `inf.sampler.sample` and, (n,), how straight the way to each was as this solver and grid saw it.

    One step is always straight. To compare flows, not samplers, take Euler on the uniform grid with many steps.
    """
    x0, values = [], []
    for chunk in torch.split(torch.arange(len(x1), device=x1.device), batch_size or len(x1)):
        trace, y = Trace(), None if label is None else label[chunk]
        end = sample(velocity, x1[chunk], solver=solver, grid=grid, nfe=nfe, t_max=t_max, label=y, callback=trace)
        x0.append(end)
        values.append(straightness([*trace.states, end], [*trace.times, 0.0]))
    return torch.cat(x0), torch.cat(values)
