"""The path against the closed forms of Gaussian data, in float64."""

import pytest
import torch

from reflow_lab import flow
from reflow_lab.gaussian import Gaussian

DATA = Gaussian(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0], dtype=torch.float64))
TIMES = torch.tensor([0.01, 0.3, 0.77, 0.99], dtype=torch.float64)


def points(n=4):
    return torch.randn(n, 2, dtype=torch.float64)


def test_sigma_and_t_are_inverse():
    torch.testing.assert_close(flow.t_from_sigma(flow.sigma_from_t(TIMES)), TIMES, rtol=1e-13, atol=0)
    assert flow.sigma_from_t(torch.tensor(flow.T_MAX, dtype=torch.float64)).item() == pytest.approx(80, rel=1e-12)
    assert flow.sigma_from_t(torch.tensor(flow.T_MIN, dtype=torch.float64)).item() == pytest.approx(0.002, rel=1e-12)


def test_velocity_and_denoiser_are_inverse():
    v, x = points(), points()
    denoised = flow.denoiser_from_velocity(v, x, TIMES)
    torch.testing.assert_close(flow.velocity_from_denoiser(denoised, x, TIMES), v, rtol=1e-12, atol=1e-12)
    assert torch.equal(denoised, x - TIMES[:, None] * v)


def test_interpolate_runs_from_data_to_noise():
    x0, x1 = points(), points()
    assert torch.equal(flow.interpolate(x0, x1, torch.tensor(0.0)), x0)
    assert torch.equal(flow.interpolate(x0, x1, torch.tensor(1.0)), x1)
    expected = (1 - TIMES[:, None]) * x0 + TIMES[:, None] * x1
    torch.testing.assert_close(flow.interpolate(x0, x1, TIMES), expected, rtol=1e-14, atol=1e-14)


def test_interpolate_keeps_the_type_of_the_data_and_broadcasts_over_images():
    x0, x1 = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    x_t = flow.interpolate(x0, x1, TIMES)
    assert x_t.dtype == torch.float32
    for i, t in enumerate(TIMES):
        torch.testing.assert_close(x_t[i], flow.interpolate(x0[i], x1[i], t))


def test_the_marginal_has_the_closed_forms_moments():
    x0 = DATA.mean + DATA.std * torch.randn(400_000, 2, dtype=torch.float64)
    x1 = torch.randn(400_000, 2, dtype=torch.float64)
    for t in TIMES:
        x_t = flow.interpolate(x0, x1, t)
        torch.testing.assert_close(x_t.mean(0), (1 - t) * DATA.mean.double(), rtol=0, atol=0.02)
        torch.testing.assert_close(x_t.std(0), DATA.spread(t), rtol=0.01, atol=0)


def test_denoise_is_the_conditional_expectation():
    """E[x0 | x_t], by Gaussian conditioning written out, equals x - t v of the closed-form velocity."""
    x = points()
    t, var = TIMES[:, None], DATA.std**2
    gain = (1 - t) * var / ((1 - t) ** 2 * var + t**2)
    expected = DATA.mean + gain * (x - (1 - t) * DATA.mean)
    torch.testing.assert_close(flow.denoise(DATA, x, TIMES), expected, rtol=1e-12, atol=1e-12)


def test_flow_map_of_the_mean_velocity_is_the_exact_jump():
    x, s = points(), TIMES.flip(0)
    jumped = flow.flow_map(DATA(x, TIMES, s), x, TIMES, s)
    torch.testing.assert_close(jumped, DATA.flow_map(x, TIMES, s), rtol=1e-11, atol=1e-11)
