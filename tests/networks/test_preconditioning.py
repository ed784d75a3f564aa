import pytest
import torch
from torch import nn

from reflow_lab.flow import denoise, sigma_from_t
from reflow_lab.gaussian import Gaussian
from reflow_lab.networks.precision import InPrecision
from reflow_lab.networks.preconditioning import Preconditioned


class Wave(nn.Module):
    """A stand-in for F that uses both its arguments."""

    def forward(self, x, t, label=None):
        return torch.sin(3 * x) + t[:, None]


class Zero(nn.Module):
    def forward(self, x, t, label=None):
        return torch.zeros_like(x)


X = torch.linspace(-4, 4, 12, dtype=torch.float64).reshape(6, 2)
T = torch.tensor([0.001, 0.1, 0.5, 0.8, 0.98, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_it_is_edms_denoiser(sigma_data):
    """D = c_skip y + c_out F(c_in y) with the coefficients of EDM's table 1, at y = x / (1 - t), sigma = t / (1 - t)."""
    sigma, y = sigma_from_t(T)[:, None], X / (1 - T[:, None])
    total = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()
    expected = c_skip * y + c_out * Wave()(c_in * y, T)
    found = denoise(Preconditioned(Wave(), sigma_data), X, T)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_with_a_zero_network_it_is_the_velocity_of_gaussian_data():
    found = Preconditioned(Zero(), 0.7)(X, T)
    torch.testing.assert_close(found, Gaussian(0.0, 0.7).velocity(X, T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_finite_and_right_at_the_ends(t):
    model, time = Preconditioned(Wave(), 0.5), torch.tensor(t, dtype=torch.float64)
    found = model(X, time)
    near = model(X, torch.tensor(abs(t - 1e-9), dtype=torch.float64))
    assert found.isfinite().all()
    torch.testing.assert_close(found, near, rtol=1e-6, atol=1e-6)


def test_one_time_serves_all_samples():
    model = Preconditioned(Wave())
    assert torch.equal(model(X, torch.tensor(0.3, dtype=torch.float64)), model(X, torch.full((6,), 0.3, dtype=torch.float64)))


def test_it_takes_no_second_time():
    with pytest.raises(TypeError, match="no second time"):
        Preconditioned(Wave())(X, T, T)


def test_precision_rounds_the_network_but_not_the_answer():
    model = Preconditioned(nn.Identity())
    model.network = Linear()
    x, t = torch.randn(8, 2), torch.rand(8)
    exact, rounded = InPrecision(model, "32-true")(x, t), InPrecision(model, "bf16-mixed")(x, t)
    assert torch.equal(exact, model(x, t)) and rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t, label=None):
        return self.layer(x)
