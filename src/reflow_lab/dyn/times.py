"""Improvement 2: the distribution T of training times.

A law maps uniform numbers u in (0, 1) to times by its inverse CDF, so that times are as reproducible as their noise.
Everything is float64 and elementwise; training clamps the result once, in `Objective`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import require
from ..flow import sigma_from_t


class TimeLaw(Protocol):
    """A distribution of t on [0, 1]."""

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF: u float64 (n,) in (0, 1) to t (n,)."""
        ...

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t), float64 (n,)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """p(t) = 1 (Rectified Flow)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF, t = u."""
        return u

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return t


@dataclass(frozen=True)
class Cosh:
    """p(t) ∝ cosh(a (t - 1/2)): U-shaped (RF++, a = 4)."""

    a: float = 4.0

    def __post_init__(self) -> None:
        require(self.a > 0, "dyn.time.a", self.a, "a number > 0")

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF, t = 1/2 + asinh((2u - 1) sinh(a/2)) / a."""
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return 0.5 + torch.sinh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))


@dataclass(frozen=True)
class LogitNormal:
    """ln sigma = logit t ~ N(mean, std^2): EDM's lognormal noise level."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        require(self.std > 0, "dyn.time.std", self.std, "a number > 0")

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF, t = sigmoid(mean + std ndtri(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return torch.special.ndtr((sigma_from_t(t).log() - self.mean) / self.std)


@dataclass(frozen=True)
class Exponential:
    """p(t) ∝ base^t (Simple ReFlow, base 10): most of the training at high noise."""

    base: float = 10.0

    def __post_init__(self) -> None:
        require(self.base > 0 and self.base != 1, "dyn.time.base", self.base, "a number > 0 other than 1 (1 is dyn/time=uniform)")

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF, t = log_base(1 + (base - 1) u)."""
        return torch.log1p((self.base - 1) * u) / math.log(self.base)

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""
        return torch.expm1(math.log(self.base) * t) / (self.base - 1)


@dataclass(frozen=True)
class Points:
    """The k times t_max/k, 2 t_max/k, ..., t_max with equal weight: distillation to k Euler steps on the uniform grid.

    Rectified Flow (arXiv 2209.03003), where t_max is 1 and k = 1 the point mass at t = 1: the times that sampling visits.
    """

    k: int = 1
    t_max: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.t_max <= 1, "dyn.time.t_max", self.t_max, "must lie in (0, 1]")
        require(self.k >= 1, "dyn.time.k", self.k, "a whole number of steps >= 1")

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse CDF, t = t_max ceil(k u) / k."""
        return self.t_max * (self.k * u).ceil() / self.k

    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t): the share of points that are <= t, up to rounding of t."""
        return (self.k * t / self.t_max + 1e-9).floor().clamp(0, self.k) / self.k
