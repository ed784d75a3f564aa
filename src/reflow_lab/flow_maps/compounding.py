"""Why consistency models get worse with more steps and flow maps do not: theorem 3.1 of Align Your Flow, on Gaussian data.

Data N(0, c^2); an error of the jump multiplies its result by 1 + e. All samples stay Gaussian, so that W2 to the data is
|standard deviation - c|, without sampling.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from ..gaussian import Gaussian

Error = Callable[[float, float], float]  #: relative error of a jump from t to s


def uniform_times(num_steps: int) -> list[float]:
    """1 down to 0."""
    return [1 - i / num_steps for i in range(num_steps + 1)]


def consistency_w2(std: float, num_steps: int, error: Error) -> float:
    """W2 after jumps to data, each renoised to the next time: V <- (1-t)^2 V + t^2, then V <- V c^2 (1 + e)^2 / S(t)^2."""
    spread, variance = spreads(std), 1.0
    for i, t in enumerate(uniform_times(num_steps)[:-1]):
        renoised = (1 - t) ** 2 * variance + t**2 if i else variance
        variance = renoised * (std * (1 + error(t, 0.0)) / spread(t)) ** 2
    return float(abs(variance**0.5 - std))


def flow_map_w2(std: float, num_steps: int, error: Error) -> float:
    """W2 after jumps from each time to the next."""
    spread, deviation = spreads(std), 1.0
    for t, s in pairwise(uniform_times(num_steps)):
        deviation *= (1 + error(t, s)) * spread(s) / spread(t)
    return float(abs(deviation - std))


def spreads(std: float) -> Callable[[float], float]:
    """S(t), the standard deviation of x_t."""
    data = Gaussian(0.0, std)
    return lambda t: float(data.spread(torch.tensor(t, dtype=torch.float64)))
