"""Losses and gradients by time against their formulas, for a velocity in closed form."""

import pytest
import torch
from torch import nn

from reflow_lab.dyn.metrics import SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Uniform
from reflow_lab.dyn.weights import LearnedNormalisation, PowerOfTime
from reflow_lab.flow import interpolate
from reflow_lab.gaussian import Gaussian
from reflow_lab.lrn.couplings import Batch
from reflow_lab.training.diagnostics import at_time
from reflow_lab.training.module import FlowModule

LAW = Gaussian(0.2, 0.5)


class Exact(nn.Module):
    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        assert not torch.is_grad_enabled()
        return LAW(x_t, t)


class Heldout:
    def batch(self, step):
        x0, x1 = torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(step))
        return Batch(0.2 + 0.5 * x0, x1, None)


def measured(t, weight):
    flow = FlowModule(Exact(), Objective(Uniform(), SquaredError(), weight), Heldout(), batch_size=4, lr=1, seed=0)
    return at_time(flow, Heldout(), t)


def miss(t):
    """v - (x1 - x0), (32, 3)."""
    x0, x1, _ = Heldout().batch(0)
    return LAW(interpolate(x0, x1, torch.tensor(t)), torch.full((32,), t)) - (x1 - x0)


def parts(values):
    return [values.min().item(), values.mean().item(), values.max().item()]


def found(values, name):
    return [values[f"{name}_{how}"] for how in ("min", "mean", "max")]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("power", [1, 2])
def test_losses_and_gradients_at_a_time(t, power):
    """The loss is the denoiser's, t^2 |miss|^2 / d; the weight 1/t^p makes the gradient in v 2 t^(2-p) miss / d."""
    values, raw = measured(t, PowerOfTime(power)), t**2 * miss(t).square().mean(1)
    assert values["loss_mean"] == pytest.approx(raw.mean().item(), rel=1e-4)
    assert found(values, "relative_loss") == pytest.approx(parts(raw / raw.mean()), rel=1e-3)
    assert found(values, "gradient") == pytest.approx(parts(2 * t ** (2 - power) * miss(t).norm(dim=1) / 3), rel=1e-3)
    assert "calibration" not in values


def test_calibration_of_a_learned_weight():
    """log l - u on average; u starts at zero."""
    weight = LearnedNormalisation(channels=3)
    log_loss = (0.25 * miss(0.5).square().mean(1)).log()
    assert measured(0.5, weight)["calibration"] == pytest.approx(log_loss.mean().item(), rel=1e-4)
    nn.init.constant_(weight.out.bias, log_loss.mean().item())
    assert measured(0.5, weight)["calibration"] == pytest.approx(0, abs=1e-4)


def test_measuring_leaves_no_gradient_behind():
    weight = LearnedNormalisation(channels=3)
    measured(0.5, weight)
    assert all(p.grad is None for p in weight.parameters())
