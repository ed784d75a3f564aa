"""What a flow map is trained on: Align Your Flow's two distillation objectives (arXiv 2506.14603) and their neighbours.

A student's mean velocity F gives the flow map f(x_t, t, s) = x_t + (s - t) F(x_t, t, s). Each objective is a vector g per sample,
the direction in which F is wrong, taken without gradient; the loss |F - sg(F - g)|^2 has the gradient 2 g . dF/dtheta. Where F is
the ODE's own mean velocity, g = 0. Signs and limits are checked in tests/flow_maps/test_objectives.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import require
from ..flow import MeanVelocity, append_dims, flow_map
from .derivatives import Derivative


class Point(NamedTuple):
    """Where a flow map is evaluated: a batch on the path, with the time s that it is to reach."""

    x_t: Tensor  #: (n, ...)
    t: Tensor  #: (n,), 1 >= t >= s
    s: Tensor  #: (n,), >= 0
    v: Tensor  #: the velocity at (x_t, t), (n, ...): a teacher's, or x1 - x0 (which an objective that does not ask gets as well)


Field = Callable[[Tensor, Tensor], Tensor]  #: a velocity, (x, t) to v: the teacher as it is guided, its label given


class Objective(Protocol):
    """The direction in which a student's mean velocity is wrong."""

    only_to_data: ClassVar[bool]  #: whether it is for s = 0 alone
    wants_equal: ClassVar[bool]  #: whether it learns the velocity only where s = t
    asks_at_start: ClassVar[bool]  #: whether it looks at the velocity at (x_t, t)

    def __call__(self, student: MeanVelocity, at: Point, F: Tensor, field: Field | None, warmup: float) -> Tensor:
        """g (n, ...), where F = student(x_t, t, s); `warmup`, r in [0, 1], scales the term with a derivative.

        field: the teacher, for an objective that asks it at other places than (x_t, t).
        """
        ...


@dataclass(frozen=True)
class EMD:
    """Eulerian map distillation: g = (F - v) + r (t - s) dF/dt, d/dt along the ODE at fixed s (AYF-EMD).

    The limit of moving f(x_t, t, s) onto f(x_t', t', s) for t' just below t. With v = x1 - x0 it is MeanFlow (arXiv 2505.13447),
    with s = 0 a continuous-time consistency model (sCM, arXiv 2410.11081).
    """

    derivative: Derivative
    only_to_data: ClassVar[bool] = False
    wants_equal: ClassVar[bool] = False
    asks_at_start: ClassVar[bool] = True

    def __call__(self, student: MeanVelocity, at: Point, F: Tensor, field: Field | None, warmup: float) -> Tensor:
        """See `Objective`."""
        dF = self.derivative(student, at, (at.v, torch.ones_like(at.t), torch.zeros_like(at.s)), F)
        return (F - at.v) + warmup * append_dims(at.t - at.s, F) * dF


@dataclass(frozen=True)
class Consistency(EMD):
    """EMD where every jump goes to data, s = 0: a continuous-time consistency model (sCM, arXiv 2410.11081)."""

    only_to_data: ClassVar[bool] = True


@dataclass(frozen=True)
class LMD:
    """Lagrangian map distillation: g = F - v(f, s) - r (t - s) dF/ds, with the teacher asked where the student arrives (AYF-LMD).

    The limit of moving f(x_t, t, s) onto one Euler step of the teacher from f(x_t, t, s'), s' just above s.
    """

    derivative: Derivative
    only_to_data: ClassVar[bool] = False
    wants_equal: ClassVar[bool] = False
    asks_at_start: ClassVar[bool] = False

    def __call__(self, student: MeanVelocity, at: Point, F: Tensor, field: Field | None, warmup: float) -> Tensor:
        """See `Objective`."""
        assert field is not None, "LMD asks a teacher at f"
        dF = self.derivative(student, at, (torch.zeros_like(at.x_t), torch.zeros_like(at.t), torch.ones_like(at.s)), F)
        arrived = flow_map(F, at.x_t, at.t, at.s)
        return F - field(arrived, at.s) - warmup * append_dims(at.t - at.s, F) * dF


@dataclass(frozen=True)
class Shortcut:
    """Self-consistency (Shortcut models, arXiv 2410.12557): one jump is two jumps of half its length; at s = t it is v.

    g = F - (F(x_t, t, u) + F(x_u, u, s)) / 2, u = (t + s) / 2, x_u = f(x_t, t, u). No derivative, so no warm-up. The paper's
    halves are of averaged weights and their lengths powers of two; here they are the student's own, of any length.
    """

    only_to_data: ClassVar[bool] = False
    wants_equal: ClassVar[bool] = True
    asks_at_start: ClassVar[bool] = True

    def __call__(self, student: MeanVelocity, at: Point, F: Tensor, field: Field | None, warmup: float) -> Tensor:
        """See `Objective`."""
        u = (at.t + at.s) / 2
        first = student(at.x_t, at.t, u)
        second = student(flow_map(first, at.x_t, at.t, u), u, at.s)
        halves = (first + second) / 2
        return F - torch.where(append_dims(at.s == at.t, F), at.v, halves)


def normalised(g: Tensor, c: float) -> Tensor:
    """g / (|g| + c), each sample by its own norm over all dimensions: tangent normalisation (sCM; AYF: c = 0.1)."""
    norm = g.flatten(1).norm(dim=1)
    return g / append_dims(norm + c, g)


class Matched(NamedTuple):
    """What one batch gave, each (n,)."""

    loss: Tensor  #: |F - sg(F - g)|^2: its value is |g|^2, its gradient 2 g . dF/dtheta
    error: Tensor  #: the mean square of g before it is normalised, without gradient: what to watch


@dataclass(frozen=True)
class Matching:
    """An objective with its stabilisers, as a loss: the body of a training step (Align Your Flow, algorithm 1).

    warmup_steps: H, over which r rises from 0 to warmup_cap; 0 has it there at once. c: of tangent normalisation, None for none.
    """

    objective: Objective
    c: float | None = 0.1
    warmup_steps: int = 10_000
    warmup_cap: float = 0.99

    def __post_init__(self) -> None:
        require(self.c is None or self.c > 0, "flow_map.c", self.c, "a number > 0, or null for no normalisation")
        require(self.warmup_steps >= 0, "flow_map.warmup_steps", self.warmup_steps, "a whole number of at least 0")
        require(0 <= self.warmup_cap <= 1, "flow_map.warmup_cap", self.warmup_cap, "must lie in [0, 1]")

    def warmup(self, step: int) -> float:
        """r = min(cap, step / H)."""
        return min(self.warmup_cap, step / self.warmup_steps) if self.warmup_steps else self.warmup_cap

    def __call__(self, student: MeanVelocity, at: Point, field: Field | None, step: int) -> Matched:
        """The losses at training step `step`, from which the warm-up is counted."""
        gpu = [at.x_t.device] if at.x_t.device.type == "cuda" else []
        dropout = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in gpu]
        F = student(at.x_t, at.t, at.s).to(at.x_t.dtype)
        with torch.no_grad(), torch.random.fork_rng(gpu):  # the student's next call drops the same
            torch.set_rng_state(dropout[0])
            for device, state in zip(gpu, dropout[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            g = self.objective(student, at, F.detach(), field, self.warmup(step))
            error = g.square().flatten(1).mean(1)
            target = F.detach() - (g if self.c is None else normalised(g, self.c))
        return Matched((F - target).square().flatten(1).sum(1), error)
