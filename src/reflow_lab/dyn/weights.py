"""Improvement 1: the weight of the loss.

A weight takes the metric's loss on D, (n,), with x_t, (n, ...), and t, (n,), to the weighted loss, (n,). It preserves
the theory if it is a function of (x_t, t) alone: then the minimiser stays E[x0 | x_t].
"""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import require
from ..flow import append_dims, sigma_from_t

LOSS_FLOOR = 1e-12  #: a loss of exactly 0 has no logarithm


class PowerOfTime(nn.Module):
    """w = t^-power: 2 is weight 1 on the velocity loss, since ||v - (x1 - x0)||^2 = ||D - x0||^2 / t^2; 1 is the baseline."""

    theory_preserving: ClassVar[bool] = True

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, loss: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return w * loss, (n,), for t > 0."""
        return loss * t**-self.power


class EDMWeight(nn.Module):
    """w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma = t / (1 - t) (EDM, table 1); 0 < t < 1."""

    theory_preserving: ClassVar[bool] = True

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        require(sigma_data > 0, "dyn.weight.sigma_data", sigma_data, "a number > 0")
        self.sigma_data = sigma_data

    def forward(self, loss: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return w * loss, (n,)."""
        return loss * (sigma_from_t(t) ** -2 + self.sigma_data**-2)


class LossNormalisation(nn.Module):
    """w = 1 / (sg[l] + eps), l the sample's own loss (Simple ReFlow, improvement 1).

    The gradient is that of log(l + eps). Right where x_t determines the pair, as after ReFlow. With a stochastic coupling
    (independent, minibatch OT) the minimiser is biased, as that of any log loss: use `LearnedNormalisation` there.
    """

    theory_preserving: ClassVar[bool] = False

    def __init__(self, eps: float = 1e-4) -> None:
        super().__init__()
        require(eps > 0, "dyn.weight.eps", eps, "a number > 0")
        self.eps = eps

    def forward(self, loss: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return w * loss, (n,): about 1 wherever l is well above eps."""
        return loss / (loss.detach() + self.eps)


class TimedConv(nn.Module):
    """A stride-2 3x3 convolution plus a linear map of the time embedding, and SiLU."""

    def __init__(self, num_in: int, num_out: int, num_embedding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel_size=3, stride=2, padding=1)
        self.time = nn.Linear(num_embedding, num_out)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(n, num_in, h, w) to (n, num_out, ceil(h / 2), ceil(w / 2))."""
        h = self.conv(h)
        return nn.functional.silu(h + append_dims(self.time(embedding), h))


class LearnedNormalisation(nn.Module):
    """w = 1 / max(exp(sg u(x_t, t)), eps), where a small network u regresses the log loss (Simple ReFlow, improvement 1).

    Returns l / max(exp(sg u), eps) + (log sg(l) - u)^2: the first term trains the velocity, the second u. Since u knows
    only (x_t, t), the minimiser is unbiased under any coupling. Its parameters want their own group in the optimiser, at
    rate `lr` and without decay. `channels` is that of the images, or the number of dimensions of flat data.
    """

    theory_preserving: ClassVar[bool] = True
    num_frequencies: ClassVar[int] = 8

    def __init__(self, channels: int, widths: tuple[int, ...] = (32, 64, 128, 256), eps: float = 1e-4, lr: float = 1e-3) -> None:
        super().__init__()
        require(eps > 0, "dyn.weight.eps", eps, "a number > 0")
        self.eps, self.lr = eps, lr
        num_embedding = 1 + 2 * self.num_frequencies
        sizes = (channels, *widths)
        self.blocks = nn.ModuleList(TimedConv(a, b, num_embedding) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def embed(self, t: Tensor) -> Tensor:
        """ln(sigma) / 4, EDM's c_noise, and its Fourier features: (n,) to (n, 1 + 2 num_frequencies); 0 < t < 1."""
        noise = sigma_from_t(t).log()[:, None] / 4
        angles = noise * torch.arange(1, self.num_frequencies + 1, device=t.device)
        return torch.cat((noise, angles.cos(), angles.sin()), dim=1)

    def log_loss(self, x_t: Tensor, t: Tensor) -> Tensor:
        """u(x_t, t), (n,): the expected log of the metric's loss. Calibrated if the mean of log l - u is 0."""
        h = x_t if x_t.ndim == 4 else x_t[:, :, None, None]  # on one pixel the convolutions are an MLP
        embedding = self.embed(t)
        for block in self.blocks:
            h = block(h, embedding)
        return self.out(h.mean((2, 3))).flatten().to(x_t.dtype)

    def forward(self, loss: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return w * loss plus the regression's own loss, (n,)."""
        u = self.log_loss(x_t, t)
        miss = loss.detach().clamp(min=LOSS_FLOOR).log() - u
        return loss / u.detach().exp().clamp(min=self.eps) + miss.square()
