"""From noise to images and back: a velocity, a grid and a solver put together (INF)."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..flow import T_MAX, T_MIN, MeanVelocity, interpolate
from ..networks.files import jumps
from .grids import Grid, ascending
from .guidance import Guidance, Guided
from .solvers import Callback, FlowMap, Solver


class CountCalls:
    """A velocity that counts: `calls` of the wrapped one, `samples` in them, and those for which guidance took a second one."""

    def __init__(self, velocity: MeanVelocity) -> None:
        self.velocity = velocity
        self.calls = 0
        self.samples = 0
        self.guided = 0

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """The wrapped velocity's answer."""
        self.calls += 1
        self.samples += len(x_t)
        if isinstance(self.velocity, Guided):
            self.guided += self.velocity.num_guided(x_t, t, lam_guid)
        return self.velocity(x_t, t, s, label=label, lam_guid=lam_guid)

    def nfe(self, num_samples: int) -> float:
        """Evaluations of the velocity a sample, for num_samples made in whatever batches."""
        return self.samples / num_samples

    def network_calls(self, num_samples: int) -> float:
        """Calls of a network a sample: guidance, where it acts, makes two of one evaluation, in one batch or not."""
        return (self.samples + self.guided) / num_samples


def require_suited(solver: Solver, description: Mapping[str, Any], how: object = None, key: str = "inf") -> None:
    """Raise a `UserError` for jumps of a velocity or of a flow map that is guided besides, and for a consistency model's ODE.

    description: of its weight file. how: the guidance. key: under which solver and guidance stand.
    """
    if not isinstance(solver, FlowMap):
        only = "solves an ODE, and this consistency model, which only jumps to data, has no velocity: flow_map with gamma=1"
        require(not description.get("only_to_data"), f"{key}/solver", type(solver).__name__, only)
        return
    velocity = "needs a flow map (flow_map=ayf in training), and this flow is a velocity"
    require(jumps(description), f"{key}/solver", "flow_map", velocity)
    told = f"guides velocities; a flow map learned its guidance and is told how strong: {key}.solver.lam_guid"
    require(not isinstance(how, Guidance), f"{key}/guidance", getattr(how, "kind", None), told)


def advise(solver: Solver, description: Mapping[str, Any]) -> None:
    """Say on stderr how a flow map is asked for what it was not trained for."""
    if not jumps(description):
        return
    if not isinstance(solver, FlowMap):
        print("this flow map is taken as a velocity, told lam_guid 1; its jumps: inf=flow_map", file=sys.stderr)
        return
    low, high = description.get("lam_guid", (1.0, 1.0))
    if not low <= solver.lam_guid <= high:
        said = f"inf.solver.lam_guid={solver.lam_guid:g}: this flow map was trained for lam_guid in [{low:g}, {high:g}] only"
        print(said, file=sys.stderr)
    if description.get("only_to_data") and solver.gamma < 1:
        said = "this consistency model jumps to data only: for more than one step, inf.solver.gamma=1"
        print(f"inf.solver.gamma={solver.gamma:g}: {said}", file=sys.stderr)


def sampling_times(solver: Solver, grid: Grid, nfe: int, t_max: float = T_MAX) -> Tensor:
    """The times from t_max down to 0 at which the solver spends nfe calls, float64 (N + 1,)."""
    _check(nfe, t_max)
    return grid(solver.num_steps(nfe, t_max, 0.0), t_max)


def inversion_times(solver: Solver, grid: Grid, nfe: int, t_max: float = T_MAX) -> Tensor:
    """The times from T_MIN up to t_max at which the solver spends nfe calls, float64 (N + 1,)."""
    _check(nfe, t_max)
    return ascending(grid, solver.num_steps(nfe, T_MIN, t_max), t_max)


def sample(
    velocity: MeanVelocity,
    x1: Tensor,
    *,
    solver: Solver,
    grid: Grid,
    nfe: int,
    t_max: float = T_MAX,
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Images x0 from noise x1 ~ N(0, I), (n, ...), by nfe calls of the velocity (a backward pair is (x0, x1)).

    Starts from t_max x1. label (n,) goes to the velocity; the networks are used in the mode and on the device they are in.
    UserError: nfe is not an integer >= 1, t_max is outside (0, 1], or grid or solver cannot do it.
    """
    times = sampling_times(solver, grid, nfe, t_max)
    x0 = torch.empty_like(x1)  # made outside inference mode, so that it can take part in training later
    with torch.inference_mode():
        x0.copy_(solver(velocity, t_max * x1, times, label=label, nfe=nfe, callback=callback))
    return x0


def invert(
    velocity: MeanVelocity,
    x0: Tensor,
    *,
    solver: Solver,
    grid: Grid,
    nfe: int,
    t_max: float = T_MAX,
    label: Tensor | None = None,
    start_noise: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Noise x1 from images x0, (n, ...), by nfe calls of the velocity: a forward pair is (x0, x1), its data exact.

    Starts at T_MIN (sigma 0.002) from (1 - T_MIN) x0, where x / (1 - t) is the image, and ends with x_{t_max} / t_max, from which
    `sample` goes back. `start_noise` z, (n, ...), adds T_MIN z, as the path has it: then one image has many x1. Errors as in
    `sample`.
    """
    times = inversion_times(solver, grid, nfe, t_max)
    x1 = torch.empty_like(x0)
    with torch.inference_mode():
        start = (1 - T_MIN) * x0 if start_noise is None else interpolate(x0, start_noise, x0.new_tensor(T_MIN))
        x1.copy_(solver(velocity, start, times, label=label, nfe=nfe, callback=callback) / t_max)
    return x1


def _check(nfe: int, t_max: float) -> None:
    whole = isinstance(nfe, int) and not isinstance(nfe, bool)
    require(whole and nfe >= 1, "nfe", nfe, "an integer of at least 1")
    require(isinstance(t_max, int | float) and 0 < t_max <= 1, "t_max", t_max, "a number in (0, 1]")
