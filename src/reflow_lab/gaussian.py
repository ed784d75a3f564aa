"""The ruler: Gaussian data, for which velocity, flow map and distance are known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import append_dims


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2), independent in every coordinate; itself a `MeanVelocity`.

    With S(t)^2 = t^2 + (1-t)^2 std^2 the marginal is x_t ~ N((1-t) mean, S(t)^2), and
    v(x, t)    = -mean + (x - (1-t) mean) (t - (1-t) std^2) / S(t)^2
    f(x, t, s) = (1-s) mean + (x - (1-t) mean) S(s) / S(t)

    f is the flow map of Align Your Flow (arXiv 2506.14603). Both are derived; tested in tests/test_gaussian.py.
    """

    mean: float | Tensor
    std: float | Tensor

    def spread(self, t: Tensor) -> Tensor:
        """S(t), the standard deviation of x_t."""
        return (t**2 + ((1 - t) * self.std) ** 2) ** 0.5

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t) = E[x1 - x0 | x_t = x]."""
        t = append_dims(t, x)
        slope = (t - (1 - t) * self.std**2) / self.spread(t) ** 2
        return slope * (x - (1 - t) * self.mean) - self.mean

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x]."""
        t = append_dims(t, x)
        return self.mean + (1 - t) * self.std**2 / self.spread(t) ** 2 * (x - (1 - t) * self.mean)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """f(x, t, s): the solution at time s of the ODE that passes x at time t."""
        t, s = append_dims(t, x), append_dims(s, x)
        return (1 - s) * self.mean + (x - (1 - t) * self.mean) * self.spread(s) / self.spread(t)

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """The velocity at t, or the mean velocity over [s, t], s != t."""
        if s is None:
            return self.velocity(x_t, t)
        return (self.flow_map(x_t, t, s) - x_t) / append_dims(s - t, x_t)


def sqrtm_psd(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix, (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def w2_squared(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """W2^2 of N(mean_a, cov_a) and N(mean_b, cov_b), which is also their Fréchet distance.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); means (d,), covariances (d, d), float64.
    """
    root_a = sqrtm_psd(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
