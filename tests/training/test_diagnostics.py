"""Losses and gradients by time against their formulas, for a velocity in closed form."""

import math

import pytest
import torch
from torch import nn

from reflow_lab.dyn.metrics import SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Uniform
from reflow_lab.dyn.weights import LOSS_FLOOR, LearnedNormalisation, PowerOfTime
from reflow_lab.flow import interpolate
from reflow_lab.gaussian import Gaussian
from reflow_lab.lrn.couplings import Batch
from reflow_lab.training.diagnostics import at_time, by_time
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


def module(weight, velocity=None):
    objective = Objective(Uniform(), SquaredError(), weight)
    return FlowModule(velocity or Exact(), objective, Heldout(), batch_size=4, lr=1, seed=0)


def measured(times, weight):
    return by_time(module(weight), Heldout(), times, {"independent": 32})


def miss(t):
    """v - (x1 - x0), (32, 3)."""
    x0, x1, _, _ = Heldout().batch(0)
    return LAW(interpolate(x0, x1, torch.tensor(t)), torch.full((32,), t)) - (x1 - x0)


def parts(values):
    return [values.min().item(), values.mean().item(), values.max().item()]


def found(values, t, name):
    return [values[f"by_time/t{t:.3f}/{name}_{how}"] for how in ("min", "mean", "max")]


TIMES = [0.1, 0.5, 0.9]


@pytest.mark.parametrize("power", [1, 2])
def test_losses_and_gradients_by_time(power):
    """The loss is the denoiser's, t^2 |miss|^2 / d; the weight 1/t^p makes the gradient in v 2 t^(2-p) miss / d."""
    values, raw = measured(TIMES, PowerOfTime(power)), {t: t**2 * miss(t).square().mean(1) for t in TIMES}
    mean = torch.stack(list(raw.values())).mean()
    assert values["heldout_loss"] == pytest.approx(mean.item(), rel=1e-4)
    for t in TIMES:
        assert values[f"by_time/t{t:.3f}/loss_mean"] == pytest.approx(raw[t].mean().item(), rel=1e-4)
        assert found(values, t, "relative_loss") == pytest.approx(parts(raw[t] / mean), rel=1e-3)
        assert found(values, t, "gradient") == pytest.approx(parts(2 * t ** (2 - power) * miss(t).norm(dim=1) / 3), rel=1e-3)
    assert len(values) == 1 + 7 * len(TIMES)


def test_relative_losses_average_to_one_over_all_times():
    values = measured(TIMES, PowerOfTime(1))
    means = [values[f"by_time/t{t:.3f}/relative_loss_mean"] for t in TIMES]
    assert sum(means) / len(means) == pytest.approx(1, rel=1e-5) and means[0] < 0.5 < 1.2 < means[2]


def test_several_kinds_have_a_held_out_loss_each():
    """The batch holds them one after the other."""
    counts = {"backward": 20, "forward": 12}
    values = by_time(module(PowerOfTime(1)), Heldout(), TIMES, counts)
    raw = torch.stack([t**2 * miss(t).square().mean(1) for t in TIMES])
    expected = {"backward": raw[:, :20].mean().item(), "forward": raw[:, 20:].mean().item()}
    assert {kind: values[f"heldout_loss/{kind}"] for kind in counts} == pytest.approx(expected, rel=1e-4)


def calibration(weight):
    return measured([0.5], weight)["by_time/t0.500/calibration"]


def test_calibration_of_a_learned_weight():
    """log l - u on average; u starts at zero."""
    weight = LearnedNormalisation(channels=3)
    log_loss = (0.25 * miss(0.5).square().mean(1)).log()
    assert calibration(weight) == pytest.approx(log_loss.mean().item(), rel=1e-4)
    nn.init.constant_(weight.out.bias, log_loss.mean().item())
    assert calibration(weight) == pytest.approx(0, abs=1e-4)


def test_calibration_of_a_perfect_fit_is_finite():
    class Perfect(nn.Module):
        def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
            return torch.zeros_like(x_t)

    batch = Batch(torch.ones(4, 3), torch.ones(4, 3), None)
    found = at_time(module(LearnedNormalisation(channels=3), Perfect()), batch, 0.5)
    assert found.raw.tolist() == [0] * 4
    assert found.more["calibration"] == pytest.approx(math.log(LOSS_FLOOR))


def test_measuring_leaves_no_gradient_behind():
    weight = LearnedNormalisation(channels=3)
    measured([0.5], weight)
    assert all(p.grad is None for p in weight.parameters())
