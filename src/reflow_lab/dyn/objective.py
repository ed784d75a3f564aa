"""The generalised flow matching loss, into which improvements 1, 2 and 3 plug."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..flow import T_CLAMP, MeanVelocity, denoise, interpolate
from .metrics import Metric
from .times import TimeLaw


@dataclass(frozen=True)
class Losses:
    """What one batch gave, each (n,)."""

    total: Tensor  #: the weighted loss, to be averaged and minimised
    raw: Tensor  #: the metric's loss on D without the weight, detached: what to log and to guard
    t: Tensor  #: the training times


class Objective(nn.Module):
    """L = E_(t ~ T) E_(x0, x1) [ w(x_t, t) || phi(x0) - phi(D(x_t, t)) ||^2 ] (Simple ReFlow, GFM loss).

    `metric` has phi in it, `weight` is a module for it may learn. float32 rounding of x0 - D at small t costs a relative
    error of the gradient above 1e-3 only for t < 1e-4 (velocity error 0.3 a pixel) or t < 6e-4 (0.03), times to which even
    the cosh law gives 0.02 and 0.12 % of the samples.
    """

    num_uniform: ClassVar[int] = 1  #: numbers u that a sample takes

    def __init__(self, time: TimeLaw, metric: Metric, weight: nn.Module) -> None:
        super().__init__()
        self.time = time
        self.metric = metric
        self.weight = weight

    @property
    def theory_preserving(self) -> bool:
        """Whether the minimiser is E[x0 | x_t] under any coupling."""
        return bool(self.metric.theory_preserving and self.weight.theory_preserving)

    def forward(
        self, velocity: MeanVelocity, x0: Tensor, x1: Tensor, u: Tensor, label: Tensor | None = None, step: int = 0
    ) -> Losses:
        """Return the losses of the pairs x0, x1, (n, ...), at the quantiles u, float64 (n,) in (0, 1), of the time law.

        They are the same at every training step.
        """
        return self.at(velocity, x0, x1, self.time.quantile(u).clamp(T_CLAMP, 1 - T_CLAMP).to(x0), label)

    def at(self, velocity: MeanVelocity, x0: Tensor, x1: Tensor, t: Tensor, label: Tensor | None = None) -> Losses:
        """Return the losses of the pairs at given times t, (n,)."""
        x_t = interpolate(x0, x1, t)
        D = denoise(velocity, x_t, t, label)  # of x0's dtype: a velocity in bfloat16 is promoted
        loss = self.metric(D, x0, t)
        return Losses(self.weight(loss, x_t, t), loss.detach(), t)
