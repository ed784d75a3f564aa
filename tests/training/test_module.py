import numpy as np
import pytest
import torch
from torch import nn

from reflow_lab.dyn.metrics import SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Uniform
from reflow_lab.dyn.weights import LearnedNormalisation, PowerOfTime
from reflow_lab.flow import interpolate
from reflow_lab.lrn.couplings import Batch
from reflow_lab.networks.precision import InPrecision
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.noise import uniform
from reflow_lab.training.module import FlowModule


class Constant(nn.Module):
    """The velocity that is a learned vector."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        return self.dropout(self.vector.expand_as(x_t))


class Steps:
    """Pairs that are a function of the step."""

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        return Batch(torch.randn(6, 2, generator=generator), torch.randn(6, 2, generator=generator), None)


def module(weight=None, **changed):
    settings = {"batch_size": 6, "lr": 0.01, "seed": 3} | changed
    objective = Objective(Uniform(), SquaredError(), weight or PowerOfTime(2))
    return FlowModule(Constant(changed.pop("dropout", 0.0)), objective, Steps(), **settings)


def test_the_loss_is_flow_matching_at_the_keyed_times():
    """With weight 1/t^2 on the denoiser's loss: mean |v - (x1 - x0)|^2."""
    flow = module()
    x0, x1, _, _ = Steps().batch(0)
    expected = (flow.velocity.vector - (x1 - x0)).square().mean()
    torch.testing.assert_close(flow.training_step(None, 0), expected, rtol=1e-4, atol=1e-5)
    u = uniform(3, "training/times", np.arange(6))[:, 0]
    assert torch.equal(flow.losses.t, u.float())
    denoised = interpolate(x0, x1, u) - u.float()[:, None] * flow.velocity.vector
    torch.testing.assert_close(flow.losses.raw, (x0 - denoised).square().mean(1), rtol=1e-5, atol=1e-6)


def test_a_step_is_repeatable_dropout_and_all():
    flow = FlowModule(Constant(0.5), Objective(Uniform(), SquaredError(), PowerOfTime(2)), Steps(), batch_size=6, lr=0.1, seed=3)
    first = flow.training_step(None, 0)
    torch.rand(7)
    assert torch.equal(flow.training_step(None, 5), first)
    flow.seed = 4
    assert not torch.equal(flow.training_step(None, 0), first)


def test_kimg_and_crossings(monkeypatch):
    flow = module()
    crossed = []
    for step in range(1, 41):
        monkeypatch.setattr(FlowModule, "global_step", step)
        assert flow.kimg == pytest.approx(step * 0.006)
        if flow.crossed(0.03):
            crossed.append(step)
    assert crossed == [5, 10, 15, 20, 25, 30, 35, 40]


def test_an_interval_shorter_than_a_step_is_every_step(monkeypatch):
    for step in range(1, 20):
        monkeypatch.setattr(FlowModule, "global_step", step)
        assert module().crossed(0.001)


def test_a_learned_weight_is_a_group_with_its_own_rate():
    flow = module(LearnedNormalisation(channels=2, lr=0.005))
    velocity, learned = flow.configure_optimizers()["optimizer"].param_groups
    assert [p is flow.velocity.vector for p in velocity["params"]] == [True] and velocity["initial_lr"] == 0.01
    assert learned["initial_lr"] == 0.005 and len(learned["params"]) == len(list(flow.objective.weight.parameters()))
    assert len(module().configure_optimizers()["optimizer"].param_groups) == 1


def test_a_learned_weight_learns():
    flow = module(LearnedNormalisation(channels=2, lr=0.005))
    optimizer = flow.configure_optimizers()["optimizer"]
    before = flow.objective.weight.out.bias.clone()
    flow.training_step(None, 0).backward()
    optimizer.step()
    assert not torch.equal(flow.objective.weight.out.bias, before)


@pytest.mark.parametrize(("warmup_kimg", "rates"), [(0, [1, 1, 1]), (0.024, [0.25, 0.5, 0.75, 1, 1])])
def test_warm_up_is_linear(warmup_kimg, rates):
    configured = module(warmup_kimg=warmup_kimg).configure_optimizers()
    found = []
    for _ in rates:
        found.append(configured["optimizer"].param_groups[0]["lr"] / 0.01)
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(("clip", "length"), [(None, 5.0), (10.0, 5.0), (0.5, 0.5)])
def test_the_velocitys_gradient_is_clipped_and_its_norm_kept(clip, length):
    flow = module(gradient_clip=clip)
    flow.velocity.vector.grad = torch.tensor([3.0, 4.0])
    flow.configure_gradient_clipping(None)
    assert flow.gradient_norm.item() == pytest.approx(5)
    assert flow.velocity.vector.grad.norm().item() == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("augment", [None, torch.arange(54.0).reshape(6, 9)])
def test_augmentation_labels_reach_the_network_through_precision_and_preconditioning(augment):
    class Network(nn.Module):
        num_classes = 0

        def forward(self, x, t, label=None, **more):
            seen.append(more)
            return x * 0

    class Augmented(Steps):
        def batch(self, step):
            return super().batch(step)._replace(augment=augment)

    seen, objective = [], Objective(Uniform(), SquaredError(), PowerOfTime(2))
    velocity = InPrecision(Preconditioned(Network()), "32-true")
    FlowModule(velocity, objective, Augmented(), batch_size=6, lr=0.1, seed=3).training_step(None, 0)
    (more,) = seen
    assert (more == {}) if augment is None else torch.equal(more["augment"], augment)
