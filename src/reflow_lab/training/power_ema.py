"""Power-function averages of weights, and any of them after the fact (EDM2: Karras et al., arXiv 2312.02696, section 3).

theta_gamma(t) = (gamma + 1) / t^(gamma + 1) * integral from 0 to t of tau^gamma theta(tau) dtau, whose width grows with t.
Times are in images seen; a width `sigma_rel` is the profile's standard deviation over t. All is float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
WIDEST = 12**-0.5  #: sigma_rel of gamma = 0, the plain mean; EDM2's inverse reaches from 0 to it


class Average(NamedTuple):
    """One average: the time it ends at, in images seen, and its width."""

    images: float
    sigma_rel: float


def gamma_to_sigma_rel(gamma: float) -> float:
    """The relative width of a profile of exponent gamma >= 0 (equation 123), in (0, WIDEST]."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent of a profile of relative width in (0, WIDEST].

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (equation 126). With u = gamma + 7/3 that is
    u^3 - p u + q = 0 of three real roots, whose largest is 2 sqrt(p / 3) cos(arccos(...) / 3): no cancellation at either end.
    """
    s = sigma_rel**-2
    p, q = s + 1 / 3, 4 * s / 3 + 2 / 27
    angle = np.arccos(np.clip(-1.5 * q / p * np.sqrt(3 / p), -1, 1)) / 3
    return float(2 * np.sqrt(p / 3) * np.cos(angle) - 7 / 3)


def step_beta(before: float, after: float, gamma: float) -> float:
    """What a step keeps of the average: (before / after)^(gamma + 1), times in images seen, 0 <= before < after.

    Exact for weights that are constant during a step, at their values after it; EDM2's (1 - batch / after)^(gamma + 1)
    (equation 127) is the same number. The first step keeps nothing of the initial weights.
    """
    return float((before / after) ** (gamma + 1))


def inner_product(times_a: Array, gammas_a: Array, times_b: Array, gammas_b: Array) -> Array:
    """The integral of the product of profiles ending at times a and b, elementwise (equation 151), in 1 / images.

    The one that ends first bounds it, so a ratio of times at most 1 is raised to the exponent of the other.
    """
    first = times_a < times_b
    ratio, exponent = np.minimum(times_a, times_b) / np.maximum(times_a, times_b), np.where(first, gammas_b, gammas_a)
    scale = (gammas_a + 1) * (gammas_b + 1) / ((gammas_a + gammas_b + 1) * np.maximum(times_a, times_b))
    return np.asarray(scale * ratio**exponent, dtype=np.float64)


def gram(rows: Sequence[Average], columns: Sequence[Average]) -> Array:
    """Inner products of averages, (rows, columns)."""
    a, b = (np.array([(x.images, sigma_rel_to_gamma(x.sigma_rel)) for x in side], dtype=np.float64) for side in (rows, columns))
    return inner_product(a[:, None, 0], a[:, None, 1], b[None, :, 0], b[None, :, 1])


def weights(targets: Sequence[Average], snapshots: Sequence[Average]) -> Array:
    """The weights (targets, snapshots) whose weighted sums of the snapshots' profiles come nearest to the targets' (algorithm 3).

    Least squares over all times, then scaled to sum 1 as EDM2 does, so that what is constant stays. The snapshots must differ
    pairwise. The system is solved with every profile at length 1, which leaves its condition to the profiles' shapes alone.
    """
    a, b = gram(snapshots, snapshots), gram(snapshots, targets)
    length = np.sqrt(np.diag(a))[:, None]
    found = np.linalg.solve(a / (length * length.T), b / length) / length
    return (found / found.sum(axis=0)).T


def residuals(targets: Sequence[Average], snapshots: Sequence[Average], found: Array) -> Array:
    """How far each reconstructed profile (targets,) is from its target: the norm of the difference over the target's.

    Below about 1e-8 it is rounding.
    """
    own = np.array([gram([target], [target])[0, 0] for target in targets])
    a, b = gram(snapshots, snapshots), gram(snapshots, targets)
    squares = np.einsum("ki,ij,kj->k", found, a, found) - 2 * np.einsum("ki,ik->k", found, b) + own
    return np.asarray(np.sqrt(np.maximum(squares, 0) / own), dtype=np.float64)
