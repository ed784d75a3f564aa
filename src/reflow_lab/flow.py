"""The path between data and noise, and the quantities that live on it.

t = 0 is data, t = 1 is noise. Everything is a pure function of tensors; `t` has shape (n,) or () and is
broadcast over the trailing dimensions of `x`.
"""

from typing import Protocol

import torch
from torch import Tensor

T_MIN = 0.002 / 1.002  #: sigma = 0.002, where forward pairs start (EDM's smallest noise level)
T_MAX = 80 / 81  #: sigma = 80, EDM's largest noise level: the default start of sampling
T_CLAMP = 1e-5  #: training times stay in [T_CLAMP, 1 - T_CLAMP] (RF++)
NO_LABEL = -1  #: the class of a sample that has none, for a conditional network; it may stand beside others in a batch


class MeanVelocity(Protocol):
    """The mean velocity F of a flow over [s, t]; with `s` omitted, the velocity at t.

    A network, an imported denoiser, a guided pair of networks and a flow map all have this signature.
    """

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """Return F(x_t, t, s): x_t (n, ...), t and s (n,) or () in [0, 1], label (n,) classes or NO_LABEL."""
        ...


def append_dims(t: Tensor, x: Tensor) -> Tensor:
    """View t, (n,) or (), so that it broadcasts against x, (n, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t x1 (Simple ReFlow, setup)."""
    return torch.lerp(x0, x1, append_dims(t, x0).to(x0.dtype))


def denoiser_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """D = x_t - t v, the estimate of x0."""
    return x_t - append_dims(t, x_t) * v


def velocity_from_denoiser(denoised: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - D) / t, for t > 0."""
    return (x_t - denoised) / append_dims(t, x_t)


def denoise(velocity: MeanVelocity, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """D(x_t, t) = x_t - t v(x_t, t)."""
    return denoiser_from_velocity(velocity(x_t, t, label=label), x_t, t)


def sigma_from_t(t: Tensor) -> Tensor:
    """sigma = t / (1 - t): EDM's noise level of y = x_t / (1 - t); infinite at t = 1."""
    return t / (1 - t)


def t_from_sigma(sigma: Tensor) -> Tensor:
    """t = sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def flow_map(mean_velocity: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """f(x_t, t, s) = x_t + (s - t) F: the jump from time t to time s (Align Your Flow)."""
    return x_t + append_dims(s - t, x_t) * mean_velocity
