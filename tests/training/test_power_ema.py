"""Power-function averages against integrals, brute force, and what EDM2's own code gives."""

import itertools

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss

from reflow_lab.training.power_ema import (
    WIDEST,
    Average,
    gamma_to_sigma_rel,
    gram,
    residuals,
    sigma_rel_to_gamma,
    step_beta,
    weights,
)

# computed by EDM2's training/phema.py (NVlabs/edm2) outside this repository
GAMMAS = {0.01: 96.99489782370986, 0.05: 16.972198602303447, 0.1: 6.937203937601809, 0.25: 0.71982395800071}
BETAS = {(0.05, 2048, 512): 0.005682981111111816, (0.1, 51200, 128): 0.9803282101959624, (0.25, 2048, 1024): 0.30358576328900555}
SNAPSHOTS = [Average(images, width) for images in (1000, 2000, 4000) for width in (0.05, 0.1)]
TARGETS = [Average(4000, width) for width in (0.03, 0.075, 0.15)]
WEIGHTS = [
    [
        -3.2148253294848804e-15,
        1.8559274431623052e-12,
        -8.602450313860272e-06,
        0.004966257204182742,
        2.2122529145096195,
        -1.2172105692653412,
    ],
    [
        5.424654131808701e-08,
        -9.697073996015768e-07,
        0.00013572050703313941,
        -0.0024265839778625895,
        0.34296934395747203,
        0.6593224349742157,
    ],
    [
        -0.0006145353624738643,
        0.0021256667374942536,
        -0.014434152250565121,
        0.0500018113716478,
        -0.3400057656220199,
        1.3029269751259167,
    ],
]


def profile(average):
    """Its density over times in images."""
    gamma = sigma_rel_to_gamma(average.sigma_rel)
    return lambda tau: np.where(tau <= average.images, (gamma + 1) / average.images * (tau / average.images) ** gamma, 0)


def integral(function, *ends):
    """By Gauss and Legendre's rule of 200 points between neighbouring ends."""
    x, w = leggauss(200)
    return sum((b - a) / 2 * np.sum(w * function((b - a) / 2 * (x + 1) + a)) for a, b in itertools.pairwise(ends))


def test_the_numbers_of_edm2():
    for width, gamma in GAMMAS.items():
        assert sigma_rel_to_gamma(width) == pytest.approx(gamma, rel=1e-12)
    for (width, after, batch), beta in BETAS.items():
        assert step_beta(after - batch, after, sigma_rel_to_gamma(width)) == pytest.approx(beta, rel=1e-12)
    np.testing.assert_allclose(weights(TARGETS, SNAPSHOTS), WEIGHTS, atol=1e-11)


@pytest.mark.parametrize("width", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.2886, WIDEST])
def test_width_and_exponent_are_each_others_inverse(width):
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(width)) == pytest.approx(width, rel=1e-12)
    assert sigma_rel_to_gamma(width) > -1e-12


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(width):
    density = profile(Average(3, width))
    mean = integral(lambda tau: tau * density(tau), 0, 3)
    variance = integral(lambda tau: (tau - mean) ** 2 * density(tau), 0, 3)
    assert integral(density, 0, 3) == pytest.approx(1, rel=1e-6)
    assert variance**0.5 / 3 == pytest.approx(width, rel=1e-6)


def test_a_step_is_exact_for_weights_that_are_constant_during_it():
    """The recursion over steps of uneven size, against the integral of each piece."""
    ends, values = np.array([0.0, 5, 6, 20, 21, 40]), np.array([3.0, -1, 4, 0.5, 2])
    for gamma in (0.0, 1.7, 16.9):
        average = 100.0
        for before, after, value in zip(ends, ends[1:], values, strict=False):
            beta = step_beta(before, after, gamma)
            average = beta * average + (1 - beta) * value
        pieces = (ends[1:] / ends[-1]) ** (gamma + 1) - (ends[:-1] / ends[-1]) ** (gamma + 1)
        assert average == pytest.approx(pieces @ values, rel=1e-12)


def test_many_small_steps_are_the_integral():
    average, gamma, n = 0.0, sigma_rel_to_gamma(0.1), 20_000
    for step in range(1, n + 1):
        beta = step_beta(step - 1, step, gamma)
        average = beta * average + (1 - beta) * np.sin(5 * step / n)
    exact = integral(lambda tau: np.sin(5 * tau) * profile(Average(1, 0.1))(tau), 0, 1)
    assert average == pytest.approx(exact, abs=2e-4)


def test_inner_products_are_the_integrals():
    averages = [Average(1, 0.05), Average(1, 0.1), Average(2.5, 0.1), Average(4, 0.25), Average(4, 0.05)]
    found = gram(averages, averages)
    for i, a in enumerate(averages):
        for j, b in enumerate(averages):
            end = min(a.images, b.images)
            expected = integral(lambda tau, a=a, b=b: profile(a)(tau) * profile(b)(tau), 0, end)
            assert found[i, j] == pytest.approx(expected, rel=1e-6)


def test_a_tracked_average_is_itself_and_weights_sum_to_one():
    found = weights([*TARGETS, SNAPSHOTS[3], SNAPSHOTS[4]], SNAPSHOTS)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(found[3:], np.eye(6)[[3, 4]], atol=1e-12)


def test_it_is_least_squares_over_time():
    """Against a solution on a grid of times by the profiles themselves, and the residual against its norm there."""
    x, w = leggauss(300)
    pieces = itertools.pairwise((0, 1000, 2000, 4000))
    times, root = (
        np.concatenate(side)
        for side in zip(*((a + (b - a) * (x + 1) / 2, (w * (b - a) / 2) ** 0.5) for a, b in pieces), strict=True)
    )
    known, wanted = (np.stack([root * profile(average)(times) for average in side], axis=1) for side in (SNAPSHOTS, TARGETS))
    expected = np.linalg.lstsq(known, wanted, rcond=None)[0]
    expected /= expected.sum(axis=0)
    found = weights(TARGETS, SNAPSHOTS)
    np.testing.assert_allclose(found, expected.T, atol=1e-9)
    misses = np.linalg.norm(known @ expected - wanted, axis=0) / np.linalg.norm(wanted, axis=0)
    np.testing.assert_allclose(residuals(TARGETS, SNAPSHOTS, found), misses, rtol=1e-6)


def test_more_snapshots_carry_more():
    """A width between the tracked ones, to a hundredth of a percent, as EDM2 keeps them: every 8 of 2147 million images."""
    target = [Average(2**31, 0.075)]

    def residual(number):
        snapshots = [Average(2**31 * k / number, width) for k in range(1, number + 1) for width in (0.05, 0.1)]
        return residuals(target, snapshots, weights(target, snapshots))[0]

    assert residual(256) < 2e-5 < residual(16) < 1e-2 < residual(4)
