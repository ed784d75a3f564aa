"""Training a flow map: Align Your Flow's step (arXiv 2506.14603, algorithm 1) in the place of the flow matching loss."""

import functools
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..dyn.objective import Losses
from ..errors import require
from ..flow import MeanVelocity, interpolate
from ..lrn.couplings import Batch
from ..noise import uniform
from .objectives import Field, Matched, Matching, Objective, Point
from .times import TimePairs


class Distillation(nn.Module):
    """A flow map learns a velocity: its teacher's, guided by lam_guid ~ U[low, high], or without a teacher x1 - x0 (MeanFlow).

    What `FlowModule` asks of an objective. A guided teacher is a `Guided` velocity, which heeds lam_guid; the student is told it.
    """

    theory_preserving: ClassVar[bool] = True  #: any coupling will do: a teacher's velocity depends on x_t alone
    num_uniform: ClassVar[int] = 4

    def __init__(
        self, matching: Matching, times: TimePairs, teacher: MeanVelocity | None, lam_guid: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__()
        low, high = lam_guid
        require(0 <= low <= high, "flow_map.guidance.lam_guid", list(lam_guid), "must be two numbers, 0 <= low <= high")
        require_suited(matching.objective, times)
        self.matching, self.times, self.lam_guid = matching, times, lam_guid
        self._teacher = [teacher]  # a list hides its weights, which are not ours to train or to save

    @property
    def teacher(self) -> MeanVelocity | None:
        """Whose velocity is learned; None: the data's."""
        return self._teacher[0]

    def forward(
        self, velocity: MeanVelocity, x0: Tensor, x1: Tensor, u: Tensor, label: Tensor | None = None, step: int = 0
    ) -> Losses:
        """Return the losses of the pairs x0, x1, (n, ...), at the times and strengths that u, float64 (n, 4) in (0, 1), means."""
        t, s = (z.to(x0) for z in self.times(u[:, :3]))
        loss, error = self.at(velocity, Batch(x0, x1, label), t, s, self.strengths(u).to(x0), step)
        return Losses(loss, error, t)

    def strengths(self, u: Tensor) -> Tensor:
        """lam_guid, float64 (n,), as u (n, 4) means it."""
        low, high = self.lam_guid
        return low + (high - low) * u[:, 3]

    def at(self, velocity: MeanVelocity, batch: Batch, t: Tensor, s: Tensor, lam_guid: Tensor, step: int) -> Matched:
        """The losses at given times and strengths, each (n,)."""
        x0, x1, label, _ = batch
        x_t = interpolate(x0, x1, t)
        field = self.field(label, lam_guid)
        v = field(x_t, t) if field is not None and self.matching.objective.asks_at_start else x1 - x0
        student = functools.partial(velocity, label=label, lam_guid=lam_guid)
        return self.matching(student, Point(x_t, t, s, v), field, step)

    def field(self, label: Tensor | None, lam_guid: Tensor) -> Field | None:
        """The teacher as it is guided, (x, t) to v, without gradient; None where there is none."""
        teacher = self.teacher
        if teacher is None:
            return None

        def asked(x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return teacher(x, t, label=label, lam_guid=lam_guid).to(x.dtype)

        return asked


def require_suited(objective: Objective, times: TimePairs) -> None:
    """Raise a `UserError` unless 4,096 draws of the times have 1 >= t >= s >= 0, and s = 0 where the objective wants it."""
    t, s = times(uniform(0, "flow_maps/times", np.arange(4096), 3))
    bad = ~((t <= 1) & (s <= t) & (s >= 0))
    first = f"t={t[bad][0]:.4g}, s={s[bad][0]:.4g}" if bad.any() else ""
    require(not bad.any(), "flow_map.times", first, "must be 1 >= t >= s >= 0: a jump goes from noise towards data")
    allowed = f"draws s > 0, but {type(objective).__name__} only jumps to data: flow_map/times=to_data"
    require(not objective.only_to_data or bool((s == 0).all()), "flow_map.times", type(times).__name__, allowed)
    allowed = f"never draws s = t, where alone {type(objective).__name__} learns the velocity: share_equal > 0"
    require(not objective.wants_equal or bool((s == t).any()), "flow_map.times", type(times).__name__, allowed)
