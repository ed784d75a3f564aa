"""The ruler is checked against derivatives, the ODE's group property and SciPy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from reflow_lab.gaussian import Gaussian, sqrtm_psd, w2_squared

DATA = Gaussian(0.4, 0.5)
X = torch.linspace(-3, 3, 10, dtype=torch.float64).reshape(5, 2)


def at(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9, 1.0])
def test_velocity_is_the_time_derivative_of_the_flow_map(t):
    _, slope = torch.func.jvp(lambda s: DATA.flow_map(X, at(t), s), (at(t),), (at(1.0),))
    torch.testing.assert_close(DATA.velocity(X, at(t)), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t", "s", "r"), [(1.0, 0.5, 0.0), (0.1, 0.9, 0.3), (0.0, 1.0, 0.7)])
def test_flow_maps_compose(t, s, r):
    through = DATA.flow_map(DATA.flow_map(X, at(t), at(s)), at(s), at(r))
    torch.testing.assert_close(through, DATA.flow_map(X, at(t), at(r)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(DATA.flow_map(X, at(t), at(t)), X, rtol=1e-14, atol=1e-14)


def test_flow_map_carries_noise_to_data():
    x0 = DATA.flow_map(torch.randn(400_000, 1, dtype=torch.float64), at(1.0), at(0.0))
    assert x0.mean().item() == pytest.approx(0.4, abs=0.005) and x0.std().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9, 1.0])
def test_denoiser_is_x_minus_t_v(t):
    torch.testing.assert_close(DATA.denoiser(X, at(t)), X - t * DATA.velocity(X, at(t)), rtol=1e-12, atol=1e-12)


def test_calls_tell_velocity_from_mean_velocity():
    t, s = at([0.9] * 5), at([0.2] * 5)
    assert torch.equal(DATA(X, t), DATA.velocity(X, t))
    mean_velocity = (DATA.flow_map(X, t, s) - X) / -0.7
    torch.testing.assert_close(DATA(X, t, s), mean_velocity, rtol=1e-12, atol=1e-12)
    near = DATA(X, t, t - 1e-6)
    torch.testing.assert_close(near, DATA(X, t), rtol=1e-5, atol=1e-5)


def covariance(dim, seed):
    root = np.random.default_rng(seed).normal(size=(dim, dim))
    return torch.from_numpy(root @ root.T)


def test_w2_of_diagonal_covariances():
    mean_a, mean_b, a, b = at([0.0, 1.0]), at([2.0, 1.0]), at([1.0, 4.0]), at([9.0, 0.25])
    expected = 4 + ((a.sqrt() - b.sqrt()) ** 2).sum()
    torch.testing.assert_close(w2_squared(mean_a, a.diag(), mean_b, b.diag()), expected, rtol=1e-12, atol=0)


def test_w2_of_commuting_covariances():
    vectors = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    a, b = torch.rand(2, 5, dtype=torch.float64) + 0.1
    expected = ((a.sqrt() - b.sqrt()) ** 2).sum()
    found = w2_squared(torch.zeros(5), (vectors * a) @ vectors.T, torch.zeros(5), (vectors * b) @ vectors.T)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 20])
def test_w2_against_scipy(dim):
    a, b, mean = covariance(dim, 1), covariance(dim, 2), torch.arange(dim, dtype=torch.float64)
    cross = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = (mean**2).sum().item() + np.trace(a.numpy() + b.numpy() - 2 * cross)
    assert w2_squared(mean, a, torch.zeros(dim), b).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(w2_squared(mean, a, torch.zeros(dim), b), w2_squared(torch.zeros(dim), b, mean, a))


def test_w2_of_a_law_with_itself_is_zero_even_if_singular():
    low_rank = covariance(6, 3)[:, :2] @ covariance(6, 3)[:, :2].T
    assert abs(w2_squared(torch.ones(6), low_rank, torch.ones(6), low_rank).item()) < 1e-6 * low_rank.trace().item()


def test_sqrtm_squares_back():
    matrix = covariance(8, 4)
    torch.testing.assert_close(sqrtm_psd(matrix) @ sqrtm_psd(matrix), matrix, rtol=1e-11, atol=1e-11)


def test_w2_of_the_flows_marginals_chain():
    """Noise, half way, data: the maps between marginals of one coordinate are monotone, so their W2 add up."""
    spreads = [DATA.spread(at(t)) for t in (1.0, 0.5, 0.0)]
    w2 = [
        w2_squared(at([0.0]), a.reshape(1, 1) ** 2, at([0.0]), b.reshape(1, 1) ** 2).sqrt()
        for a, b in [(spreads[0], spreads[1]), (spreads[1], spreads[2]), (spreads[0], spreads[2])]
    ]
    assert spreads[0] > spreads[1] > spreads[2] - 0.1
    moved = [abs((a - b).item()) for a, b in [(spreads[0], spreads[1]), (spreads[1], spreads[2]), (spreads[0], spreads[2])]]
    assert [w.item() for w in w2] == pytest.approx(moved, rel=1e-9)
