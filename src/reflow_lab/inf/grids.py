"""Improvement 6: where on [0, t_max] the solver stops. Float64 times of shape (N + 1,), from t_max strictly down to 0."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import bad_value, require
from ..flow import T_MIN, t_from_sigma

SIGMA_MIN = 0.002  #: EDM's smallest noise level; T_MIN is the same in t


class Grid(Protocol):
    """Times of num_steps steps from t_max down to 0."""

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """Return (num_steps + 1,) float64 times on the CPU, strictly descending from t_max to 0."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Equal steps in t (Rectified Flow)."""

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """t_i = t_max (1 - i/N)."""
        return _unit(num_steps) * t_max


@dataclass(frozen=True)
class Sigmoid:
    """Dense at both ends: s(u) = sigmoid(kappa (u - 1/2)), scaled to [0, t_max] (Simple ReFlow, improvement 6).

    kappa in [0, 60]: 10 and 20 are known values, 0 is uniform; beyond 60 neighbours near t = 1 are equal in float64.
    """

    kappa: float = 10.0

    def __post_init__(self) -> None:
        require(0 <= self.kappa <= 60, "kappa", self.kappa, "a number from 0 (uniform) to 60")

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """t_i = t_max (s(u) - s(0)) / (s(1) - s(0)), u = 1 - i/N."""
        u = _unit(num_steps)
        if self.kappa == 0:
            return u * t_max
        # The same by addition theorems, without a difference of near-equal numbers, so that tiny kappa and u keep all digits.
        scaled = (self.kappa * u / 2).sinh() / ((self.kappa * (u - 0.5) / 2).cosh() * 2 * math.sinh(self.kappa / 4))
        return _pinned(scaled * t_max, t_max)


@dataclass(frozen=True)
class EDM:
    """N noise levels equally spaced in sigma^(1/rho), from sigma_max = t_max / (1 - t_max) to sigma_min, then 0.

    Karras et al. 2022, equation 5. rho > 0, published 7; sigma_min in (0, sigma_max); t_max below 1, where sigma is infinite.
    """

    rho: float = 7.0
    sigma_min: float = SIGMA_MIN

    def __post_init__(self) -> None:
        require(self.rho > 0, "rho", self.rho, "a number above 0")
        require(self.sigma_min > 0, "sigma_min", self.sigma_min, "a number above 0")

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """t_i = sigma_i / (1 + sigma_i), i < N, and t_N = 0."""
        sigma_max = _sigma_max(t_max, self.sigma_min)
        roots = _linspace(sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho), num_steps)
        return _then_zero(t_from_sigma(roots**self.rho), t_max)


@dataclass(frozen=True)
class LogitUniform:
    """N noise levels equally spaced in logit t = log sigma, from t_max to sigma_min, then 0: EDM's grid for rho -> inf.

    The uniform-lambda grid of DPM-Solver (Lu et al. 2022). sigma_min in (0, sigma_max); t_max below 1.
    """

    sigma_min: float = SIGMA_MIN

    def __post_init__(self) -> None:
        require(self.sigma_min > 0, "sigma_min", self.sigma_min, "a number above 0")

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """logit t_i linear in i < N, and t_N = 0."""
        sigma_max = _sigma_max(t_max, self.sigma_min)
        return _then_zero(_linspace(math.log(sigma_max), math.log(self.sigma_min), num_steps).sigmoid(), t_max)


@dataclass(frozen=True)
class Listed:
    """A grid given as a list: N + 1 fractions of t_max, strictly descending from 1 to 0."""

    times: Sequence[float]

    def __post_init__(self) -> None:
        times = [float(time) for time in self.times]
        falls = all(a > b for a, b in itertools.pairwise(times))
        valid = len(times) > 1 and falls and times[0] == 1 and times[-1] == 0
        require(valid, "times", times, "fractions of t_max, strictly descending from 1 to 0")

    def __call__(self, num_steps: int, t_max: float) -> Tensor:
        """The listed times t_max; num_steps has to be the number of listed steps."""
        listed = len(self.times) - 1
        allowed = f"the list has {listed} steps, but this solver and nfe take {num_steps}"
        require(listed == num_steps, "grid.times", list(self.times), allowed)
        return torch.tensor([float(time) for time in self.times], dtype=torch.float64) * t_max


def ascending(grid: Grid, num_steps: int, t_max: float, t_min: float = T_MIN) -> Tensor:
    """Times for forward pairs: num_steps steps from t_min up to t_max, float64 (num_steps + 1,).

    They are the times of the coarsest downward grid with num_steps points above t_min, in reverse, and t_min in place of all
    that lies at or below it (at sigma = 0 the first step would be degenerate). EDM's grid ends at t_min by default: there
    the times are its own levels.
    """
    require(t_min < t_max, "t_max", t_max, f"a number above {t_min:.6g}, where forward pairs start")
    for size in range(num_steps, 100 * num_steps + 1):
        times = grid(size, t_max).flip(0)
        above = times[times > t_min * (1 + 1e-9)]
        if len(above) >= num_steps:
            return torch.cat((above.new_tensor([t_min]), above[-num_steps:]))
    raise bad_value("grid", grid, f"a grid with at least {num_steps} points above t = {t_min:.6g}")


def _linspace(start: float, end: float, num: int) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def _unit(num_steps: int) -> Tensor:
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def _sigma_max(t_max: float, sigma_min: float) -> float:
    require(t_max < 1, "t_max", t_max, "this grid is spaced in sigma, infinite at t = 1: a t_max below 1 (80/81 is sigma 80)")
    sigma_max = t_max / (1 - t_max)
    require(sigma_max > sigma_min, "t_max", t_max, f"a number above {sigma_min / (1 + sigma_min):.6g}, this grid's lowest level")
    return sigma_max


def _pinned(times: Tensor, t_max: float) -> Tensor:
    """The times with their first one exactly t_max, whatever the rounding."""
    times[0] = t_max
    return times


def _then_zero(times: Tensor, t_max: float) -> Tensor:
    return torch.cat((_pinned(times, t_max), times.new_zeros(1)))
