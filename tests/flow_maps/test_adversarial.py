"""Adversarial fine-tuning: losses, penalties and the adaptive weight against closed forms."""

import math

import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.flow_maps.adversarial import (
    MOST_WEIGHT,
    Adversarial,
    adaptive_weight,
    critic_loss,
    gradient_norm,
    judged,
    penalty,
    student_loss,
)
from reflow_lab.networks.discriminator import Discriminator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic(nn.Module):
    """D(x) = a . x + b |x|^2 / 2, whose slope is a + b x."""

    def __init__(self, dim, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(normal(dim, seed=9)), nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x, label=None):
        return x.flatten(1) @ self.a + self.b * x.flatten(1).square().sum(1) / 2


def test_the_losses_at_known_values():
    real, fake = torch.tensor([0.0, 2.0, 1.0]).double(), torch.tensor([0.0, 1.0, 31.0]).double()
    torch.testing.assert_close(critic_loss(real, fake), torch.tensor([math.log(2), math.log1p(math.exp(-1)), 30]).double())
    torch.testing.assert_close(student_loss(real, fake), torch.tensor([math.log(2), math.log1p(math.e), math.exp(-30)]).double())


def test_each_side_pulls_its_way_and_only_differences_count():
    real, fake = (normal(5, seed=s).requires_grad_() for s in (1, 2))
    to_real, to_fake = torch.autograd.grad(critic_loss(real, fake).sum(), (real, fake))
    sigmoid = torch.sigmoid(fake - real).detach()
    torch.testing.assert_close((to_real, to_fake), (-sigmoid, sigmoid))  # D rises at data, falls at samples
    (to_fake,) = torch.autograd.grad(student_loss(real.detach(), fake).sum(), fake)
    torch.testing.assert_close(to_fake, sigmoid - 1)  # the student's samples rise
    torch.testing.assert_close(critic_loss(real + 7, fake + 7), critic_loss(real, fake))


def test_penalties_of_linear_and_quadratic_discriminators():
    x, linear, quadratic = normal(6, 3, 2, 2), Quadratic(12), Quadratic(12, b=0.7)
    torch.testing.assert_close(judged(linear, x, None).squared_slope, linear.a.square().sum().expand(6))
    found = judged(quadratic, x, None)
    slope = quadratic.a + 0.7 * x.flatten(1)
    torch.testing.assert_close(found.squared_slope, slope.square().sum(1))
    torch.testing.assert_close(found.value, quadratic(x))
    torch.testing.assert_close(penalty(found.squared_slope, 0.3), 0.15 * slope.square().sum(1))
    (gradient,) = torch.autograd.grad(penalty(found.squared_slope, 0.3).sum(), quadratic.a)
    torch.testing.assert_close(gradient, 0.3 * slope.sum(0).detach())


def test_a_penalty_trains_the_discriminator_and_not_the_sample():
    x = normal(4, 2).float().requires_grad_()
    discriminator = Discriminator((2,), channels=8)
    judged(discriminator, x, None).squared_slope.sum().backward()
    assert x.grad is None and discriminator.trunk[0].weight.grad.abs().max() > 0


def test_the_real_discriminators_slope_is_that_of_differences():
    discriminator, x = Discriminator((2,), channels=8).double(), normal(4, 2)
    found, h = judged(discriminator, x, None), 1e-6
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(2):
            step = torch.zeros_like(x)
            step[i, j] = h
            expected[i] += ((discriminator(x + step) - discriminator(x - step)).sum() / (2 * h)).detach() ** 2
    torch.testing.assert_close(found.squared_slope, expected, rtol=1e-5, atol=1e-10)


def hand_made(scale):
    """A body and a last layer; two losses whose gradients at the last layer are 3, 4 and scale times 6, 8."""
    body, last = torch.tensor([1.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    out = body * last
    return out @ torch.tensor([3.0, 4.0]), scale * out @ torch.tensor([6.0, 8.0]), last


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    regulariser, adversarial, last = hand_made(1.0)
    assert gradient_norm(regulariser, [last]).item() == pytest.approx(5)
    weight = adaptive_weight(regulariser, adversarial, [last])
    assert weight.item() == pytest.approx(0.5) and not weight.requires_grad
    (regulariser + weight * adversarial).backward()  # the graph is still there
    torch.testing.assert_close(last.grad, torch.tensor([6.0, 8.0]))


def test_the_adaptive_weight_is_clamped():
    for scale, expected in ((1e-9, MOST_WEIGHT), (0.0, MOST_WEIGHT), (1e9, 5e-10)):
        regulariser, adversarial, last = hand_made(scale)
        assert adaptive_weight(regulariser, adversarial, [last]).item() == pytest.approx(expected)
    regulariser, adversarial, last = hand_made(1.0)
    assert adaptive_weight(0 * regulariser, adversarial, [last]).item() == 0
    assert adaptive_weight(0 * regulariser, 0 * adversarial, [last]).item() == 0


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"t": 1.5}, "t=1.5: must lie in (0, 1], or null for the batch's own times"),
        ({"t": 0.0}, "t=0.0: must lie in (0, 1]"),
        ({"weight": -1}, "weight=-1: must be a number of at least 0"),
        ({"r1": -0.1}, "r1=-0.1: must be a number of at least 0"),
        ({"r2": -0.1}, "r2=-0.1: must be a number of at least 0"),
        ({"lr": 0}, "lr=0: must be a positive number"),
        ({"betas": [0.5]}, "betas=[0.5]: must be two numbers in [0, 1)"),
        ({"group_size": 0}, "group_size=0: must be a whole number of at least 1"),
        ({"channels": 1.5}, "channels=1.5: must be a whole number of at least 1"),
    ],
)
def test_settings_that_are_none(wrong, allowed):
    with pytest.raises(UserError) as caught:
        Adversarial(**({"t": 0.9} | wrong))
    assert str(caught.value).startswith(f"flow_map.adversarial.{allowed}")


def test_a_discriminator_is_the_seeds_alone():
    how = Adversarial(0.9, channels=8)
    first, state = how.discriminator((2,), 0, 5), torch.get_rng_state()
    torch.rand(1)
    again, other = how.discriminator((2,), 0, 5), how.discriminator((2,), 0, 6)
    assert torch.equal(first.value.weight, again.value.weight) and not torch.equal(first.value.weight, other.value.weight)
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    how.discriminator((2,), 0, 5)
    assert torch.equal(torch.rand(1), expected)
