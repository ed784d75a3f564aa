"""Improvement 7: rules that carry x along dx/dt = v(x, t) over a grid of times, downward (sampling) or upward (forward pairs).

All two-call rules are one rule. An Euler step is the same in t and in sigma = t/(1-t), and the slope of y = x/(1-t) over sigma
is d = x + (1-t) v, so that a rule in sigma with slope (1-b) d + b d_m becomes, without 0/0,

    x_m    = x + (t_m - t) v(x, t)
    x_next = x + (t_next - t) [(1-c) v(x, t) + c v(x_m, t_m)],     c = b (1 - t_m) / (1 - t)

Heun in t, Heun in sigma and DPM-Solver(r) only choose t_m and c. Coefficients are Python floats, in float64; x keeps its type.
"""

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import require
from ..flow import T_MIN, MeanVelocity
from ..noise import Indices, normal

Callback = Callable[[int, float, Tensor], None]  #: called as (i, t_i, x_i) before step i
Field = Callable[..., Tensor]  #: (x, t) -> v, with the label bound; (x, t, s=, lam_guid=) -> F of a flow map
Rule = Callable[[Field, Tensor, float, float], Tensor]  #: (field, x, t, t_next) -> x_next


class Solver(Protocol):
    """Integrates a velocity over a grid."""

    @property
    def fixed_step(self) -> bool:
        """Whether the steps are the grid's: then a sample does not depend on its batch, and nfe is exact."""
        ...

    def num_steps(self, nfe: int, start: float, stop: float) -> int:
        """How many grid steps from time `start` to time `stop` make `nfe` calls of the velocity."""
        ...

    def __call__(
        self,
        velocity: MeanVelocity,
        x: Tensor,
        grid: Tensor,
        *,
        label: Tensor | None = None,
        nfe: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Carry x, (n, ...), from time grid[0] to grid[-1] with `nfe` calls; nfe omitted: as many as the rule can use."""
        ...


def with_label(velocity: MeanVelocity, label: Tensor | None) -> Field:
    """The velocity as a solver's rule asks it: one time for all samples, the label given."""

    def field(x: Tensor, t: float, **more: float) -> Tensor:
        told = {name: x.new_full((x.shape[0],), value) for name, value in more.items()}
        return velocity(x, x.new_full((x.shape[0],), t), label=label, **told).to(x.dtype)  # a network in bfloat16 answers in it

    return field


def euler_step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
    """x + (t_next - t) v(x, t)."""
    return torch.add(x, field(x, t), alpha=t_next - t)


class FixedStep(ABC):
    """A solver that applies one rule between neighbouring times; a new one needs `step` only (one call a step)."""

    fixed_step: ClassVar[bool] = True

    @property
    def is_random(self) -> bool:
        """Whether its rules add noise of their own."""
        return False

    @abstractmethod
    def step(self, field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        """The state at t_next from the state x, (n, ...), at t; field(x, t) is the velocity."""

    def num_steps(self, nfe: int, start: float, stop: float) -> int:
        """One call a step."""
        return nfe

    def rules(self, x: Tensor, times: list[float], nfe: int | None) -> Sequence[Rule]:
        """The rule of each step."""
        return [self.step] * (len(times) - 1)

    def __call__(
        self,
        velocity: MeanVelocity,
        x: Tensor,
        grid: Tensor,
        *,
        label: Tensor | None = None,
        nfe: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Carry x, (n, ...), float32 or float64, over the grid; the velocity sees t as (n,) of x's type."""

        field, times = with_label(velocity, label), grid.tolist()
        for i, rule in enumerate(self.rules(x, times, nfe)):
            if callback is not None:
                callback(i, times[i], x)
            x = rule(field, x, times[i], times[i + 1])
        return x


@dataclass(frozen=True)
class Euler(FixedStep):
    """Euler's rule, first order; the same in t and in sigma (there it is DDIM)."""

    def step(self, field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        """x + (t_next - t) v."""
        return euler_step(field, x, t, t_next)


class TwoCall(FixedStep):
    """A second-order rule of two calls a step, and Euler's where it must be (Simple ReFlow, improvement 7; EDM, algorithm 1).

    A step that touches a `singular` time is Euler: t = 0, where an EDM denoiser gives v = 0/0, and for rules in sigma
    t = 1, where sigma is infinite. What nfe leaves over is one more Euler step at the noise end. So, downward from t_max < 1:
    nfe = 2N - 1 has the last of N steps Euler, nfe = 2N - 2 the first and the last; upward from t_min > 0: nfe = 2N has none,
    nfe = 2N - 1 the last. At 1 and 2 NFE downward every such rule is Euler.
    """

    singular: ClassVar[tuple[float, ...]] = (0.0,)

    @abstractmethod
    def stage(self, t: float, t_next: float) -> tuple[float, float]:
        """The time t_m of the second call and its weight c."""

    def step(self, field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        """x + (t_next - t) [(1-c) v + c v_m]."""
        t_m, c = self.stage(t, t_next)
        v = field(x, t)
        v_m = field(torch.add(x, v, alpha=t_m - t), t_m)
        return torch.add(x, torch.lerp(v, v_m, c), alpha=t_next - t)

    def num_steps(self, nfe: int, start: float, stop: float) -> int:
        """The fewest steps that make exactly nfe calls: two each, but one in an Euler step."""
        touching = (start in self.singular) + (stop in self.singular)
        return min(nfe, (nfe + touching + 1) // 2)

    def rules(self, x: Tensor, times: list[float], nfe: int | None) -> Sequence[Rule]:
        """Euler's rule for the step that touches t = 0 and for the steps next to the noise that nfe leaves over."""
        num_steps = len(times) - 1
        touching = (times[0] in self.singular) + (times[-1] in self.singular)
        num_euler = min(touching, num_steps) if nfe is None else 2 * num_steps - nfe
        assert min(touching, num_steps) <= num_euler <= num_steps, f"{nfe} calls do not fit {num_steps} steps"
        at_data = int(0.0 in (times[0], times[-1]))
        num_second = num_steps - num_euler
        from_noise: Sequence[Rule] = [euler_step] * (num_euler - at_data) + [self.step] * num_second + [euler_step] * at_data
        return from_noise if times[0] > times[-1] else from_noise[::-1]


@dataclass(frozen=True)
class Heun(TwoCall):
    """Heun's rule in t: the mean of the slopes at both ends."""

    def stage(self, t: float, t_next: float) -> tuple[float, float]:
        """t_m = t_next, c = 1/2."""
        return t_next, 0.5


@dataclass(frozen=True)
class HeunSigma(TwoCall):
    """Heun's rule in sigma, EDM's sampler without churn (Karras et al. 2022, algorithm 1)."""

    singular: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    def stage(self, t: float, t_next: float) -> tuple[float, float]:
        """t_m = t_next, b = 1/2."""
        return t_next, (1 - t_next) / (1 - t) / 2


@dataclass(frozen=True)
class DPM(TwoCall):
    """DPM-Solver-2 in sigma with the second call at sigma_m = sigma^(1-r) sigma_next^r and b = 1/(2r).

    Simple ReFlow, improvement 7. r in (0, 1]: 0.4 is the improved choice, 1/2 the geometric midpoint, 1 Heun in sigma.
    """

    r: float = 0.4

    singular: ClassVar[tuple[float, ...]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require(0 < self.r <= 1, "r", self.r, "a number in (0, 1]")

    def stage(self, t: float, t_next: float) -> tuple[float, float]:
        """t_m = sigma_m / (1 + sigma_m), c = (1 - t_m) / (1 - t) / (2r)."""
        sigma_m = (t / (1 - t)) ** (1 - self.r) * (t_next / (1 - t_next)) ** self.r
        return sigma_m / (1 + sigma_m), 1 / ((1 + sigma_m) * (1 - t) * 2 * self.r)


@dataclass(frozen=True)
class RFPlusPlus(FixedStep):
    """RF++'s rule: each step returns to the line from the current estimate of the image to the initial noise (arXiv 2405.20320).

    Downward only; the initial noise is z1 = x_start / t_start. On a straight flow it is exact, as Euler; elsewhere it is
    a rule of its own that does not converge to the ODE as the steps shrink.
    """

    def step(self, field: Field, x: Tensor, t: float, t_next: float, z1: Tensor | None = None) -> Tensor:
        """(1 - t_next) (x - t v) + t_next z1; z1 omitted: x / t."""
        denoised = torch.add(x, field(x, t), alpha=-t)
        return torch.lerp(denoised, x / t if z1 is None else z1, t_next)

    def rules(self, x: Tensor, times: list[float], nfe: int | None) -> Sequence[Rule]:
        """The rule with the noise that x starts from."""
        require(times[0] > times[-1], "solver", "rfpp", "goes from noise to data only; forward pairs need another solver")
        return [functools.partial(self.step, z1=x / times[0])] * (len(times) - 1)


@dataclass(frozen=True)
class Adaptive:
    """dopri5 of torchdiffeq, with steps by tolerance; of the grid only the ends count, and for a callback the times of report.

    Near t = 0 it stops at sigma = 0.002 and takes an Euler step to 0, where an EDM denoiser gives v = 0/0.
    Steps depend on the whole batch, so a sample depends on its neighbours, and nfe only sets the size of the grid.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    fixed_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.rtol > 0, "rtol", self.rtol, "a number above 0")
        require(self.atol > 0, "atol", self.atol, "a number above 0")

    def num_steps(self, nfe: int, start: float, stop: float) -> int:
        """One grid step for each of nfe; the calls made follow from the tolerance."""
        return nfe

    def __call__(
        self,
        velocity: MeanVelocity,
        x: Tensor,
        grid: Tensor,
        *,
        label: Tensor | None = None,
        nfe: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Carry x, (n, ...), from grid[0] to grid[-1]; callback sees the states at the grid's times."""
        from torchdiffeq import odeint  # here, since it loads scipy, which takes longer than `reflow-lab --help` may

        def field(t: Tensor, x: Tensor) -> Tensor:
            return velocity(x, t.expand(len(x)), label=label).to(x.dtype)

        times = self._times(grid, every=callback is not None).to(x.device)
        options = {"step_t": times[-1:]}  # without it the last step would look beyond the end
        states = odeint(field, x, times, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        if callback is not None:
            for i, t in enumerate(times[times != grid[-1].item()].tolist()):
                callback(i, t, states[i])
        left = (grid[-1] - times[-1]).item()
        return torch.add(states[-1], field(times[-1].to(x), states[-1]), alpha=left) if left else states[-1]

    @staticmethod
    def _times(grid: Tensor, every: bool) -> Tensor:
        """The ends, or every time, of the grid, with T_MIN for what lies below it at a lower end."""
        times = grid if every else grid[[0, -1]]
        if grid[-1] >= T_MIN:
            return times
        require(grid[0].item() > T_MIN, "t_max", grid[0].item(), f"a number above {T_MIN:.6g} with the adaptive solver")
        return torch.cat((times[times > T_MIN * (1 + 1e-9)], times.new_tensor([T_MIN])))


@dataclass(frozen=True)
class FlowMap(FixedStep):
    """The jumps of a flow map from each time to the next (Align Your Flow), one call each; downward only.

    gamma in [0, 1] is how much of the noise at the next time is fresh: 0 is deterministic, 1 jumps to data and noises again, as a
    consistency model does. With sigma = s / (1 - s) and sigma' = sqrt(1 - gamma^2) sigma, s' = sigma' / (1 + sigma'),
    x_s = (1 - s) / (1 - s') f(x, t, s') + gamma s z keeps the marginal (derived, tested on Gaussians). lam_guid is the guidance
    that the flow map is told, 1 is none. z is keyed by the sample's own starting noise, so that no sample depends on its batch.
    """

    gamma: float = 0.0
    lam_guid: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "inf.solver.gamma", self.gamma, "a number in [0, 1]")
        require(self.lam_guid >= 0, "inf.solver.lam_guid", self.lam_guid, "a number of at least 0; 1 is no guidance")

    @property
    def is_random(self) -> bool:
        """With gamma > 0."""
        return self.gamma > 0

    def step(self, field: Field, x: Tensor, t: float, t_next: float, noise: Callable[[], Tensor] | None = None) -> Tensor:
        """(1 - s) / (1 - s') f(x, t, s') + gamma s z, where s = t_next and noise() is z; f(x, t, s) without noise or at s = 0."""
        aim = self.aim(t_next) if noise else t_next
        jumped = torch.add(x, field(x, t, s=aim, lam_guid=self.lam_guid), alpha=aim - t)
        if noise is None or t_next == 0:
            return jumped
        return (1 - t_next) / (1 - aim) * jumped + self.gamma * t_next * noise()

    def rules(self, x: Tensor, times: list[float], nfe: int | None) -> Sequence[Rule]:
        """The jump of each step, with noise of its own."""
        require(times[0] > times[-1], "inf/solver", "flow_map", "goes from noise to data only; forward pairs need another solver")
        if not self.is_random:
            return super().rules(x, times, nfe)
        keys = row_keys(x)

        def noise(number: int) -> Tensor:
            return normal(0, f"inf/flow_map/{number}", keys, tuple(x.shape[1:])).to(x)

        return [functools.partial(self.step, noise=functools.partial(noise, i)) for i in range(len(times) - 1)]

    def aim(self, s: float) -> float:
        """s', from which fresh noise leads back to s."""
        kept = math.sqrt(1 - self.gamma**2) * s
        return kept / (1 - s + kept)


def row_keys(x: Tensor) -> Indices:
    """A number in [0, 2^62) for each row of x, (n, ...), from its bytes alone."""
    rows = x.detach().cpu().contiguous().flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.array([int.from_bytes(found, "little") >> 2 for found in digests], dtype=np.int64)
