from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reflow_lab.dyn.metrics import HighPass, Metric, PseudoHuber, SquaredError
from reflow_lab.dyn.objective import Losses, Objective
from reflow_lab.dyn.times import Cosh, Exponential, LogitNormal, Points, TimeLaw, Uniform
from reflow_lab.dyn.weights import EDMWeight, LearnedNormalisation, LossNormalisation, PowerOfTime
from reflow_lab.errors import UserError
from reflow_lab.flow import T_CLAMP, append_dims, denoiser_from_velocity, interpolate, velocity_from_denoiser
from reflow_lab.gaussian import Gaussian

TIMES: list[TimeLaw] = [Uniform(), Cosh(), LogitNormal(), Exponential(), Points(1), Points(4)]
METRICS: list[Metric] = [SquaredError(), HighPass(lam_hpf=0.0), HighPass(lam_hpf=1.0), HighPass(lam_hpf=1000.0)]


def learned() -> LearnedNormalisation:
    """A learned weight that has learned something, so that it varies with x_t and t."""
    torch.manual_seed(0)
    weight = LearnedNormalisation(channels=1).double()
    nn.init.normal_(weight.out.weight)
    return weight


WEIGHTS: list[Callable[[], nn.Module]] = [
    lambda: PowerOfTime(0),
    lambda: PowerOfTime(1),
    lambda: PowerOfTime(2),
    EDMWeight,
    learned,
]


class ConstantDenoiser:
    """The velocity of the denoiser that answers D everywhere."""

    def __init__(self, D: Tensor) -> None:
        self.D = D

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label=None, lam_guid=None) -> Tensor:
        return velocity_from_denoiser(self.D, x_t, t)


def posterior_batch(objective: Objective, values: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every value of x0 at every quantile, with the x1 for which all pass one and the same x_t at that time."""
    u = u.repeat_interleave(len(values))
    x0 = values.repeat(len(u) // len(values), *(1 for _ in values.shape[1:]))
    t = append_dims(objective.time.quantile(u).clamp(T_CLAMP, 1 - T_CLAMP), x0)
    return x0, (0.3 - (1 - t) * x0) / t, u


SKEWED = torch.tensor([-1.0, -1.0, -1.0, -1.0, 3.0], dtype=torch.float64)  # -1 with 0.8, +3 with 0.2
QUANTILES = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)


def gradient(objective: Objective, values: Tensor, u: Tensor, D: Tensor) -> Tensor:
    """The gradient in D of the mean loss when D is the answer to everything: what training follows."""
    D = D.clone().requires_grad_()
    x0, x1, u = posterior_batch(objective, values, u)
    total = objective(ConstantDenoiser(D), x0, x1, u).total.mean()
    return torch.autograd.grad(total, D)[0]


def where_training_ends(objective: Objective, shape: tuple[int, ...] = (1, 8, 8)) -> float:
    """The constant D at which the gradient changes sign, by bisection of [-2, 2]; samples of one value everywhere."""
    values = SKEWED.reshape(5, *(1 for _ in shape)).expand(5, *shape)
    low, high = -2.0, 2.0
    for _ in range(45):
        middle = (low + high) / 2
        slope = gradient(objective, values, QUANTILES, torch.full((1, *shape), middle, dtype=torch.float64)).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return middle


@pytest.mark.parametrize("weight", WEIGHTS, ids=["power0", "velocity", "inverse_t", "edm", "learned"])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_minimiser_is_the_posterior_mean_for_every_theory_preserving_choice(metric: Metric, weight) -> None:
    for time in TIMES:
        objective = Objective(time, metric, weight())
        assert objective.theory_preserving
        assert where_training_ends(objective) == pytest.approx(-0.2, abs=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS, ids=["power0", "velocity", "inverse_t", "edm", "learned"])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_gradient_vanishes_at_the_posterior_mean_of_images(metric: Metric, weight) -> None:
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator)
    values = two[[0, 0, 0, 0, 1]]
    for time in TIMES:
        objective = Objective(time, metric, weight())
        at_mean = gradient(objective, values, QUANTILES, values.mean(0, keepdim=True)).norm()
        at_median = gradient(objective, values, QUANTILES, two[:1]).norm()
        assert at_mean < 1e-10 * at_median


def test_minimiser_of_pseudo_huber_leans_to_the_median() -> None:
    """On one pixel, c = 0.4: 0.8 a / sqrt(a^2 + c^2) = 0.2 b / sqrt(b^2 + c^2), a = D + 1, b = 3 - D, is solved by -0.897."""
    objective = Objective(Points(1), PseudoHuber(c_per_dim=0.4), PowerOfTime(0))
    assert not objective.theory_preserving
    found = where_training_ends(objective, shape=(1,))
    a, b = found + 1, 3 - found
    assert 0.8 * a / (a**2 + 0.16) ** 0.5 == pytest.approx(0.2 * b / (b**2 + 0.16) ** 0.5)
    assert found == pytest.approx(-0.90, abs=0.005)


def test_minimiser_of_the_own_sample_log_loss_is_the_mode() -> None:
    objective = Objective(Uniform(), SquaredError(), LossNormalisation(eps=1e-4))
    assert not objective.theory_preserving
    assert where_training_ends(objective) == pytest.approx(-1.0, abs=1e-3)


def test_loss_normalisation_is_unbiased_where_x_t_determines_the_pair() -> None:
    """A deterministic coupling: every velocity is right at its own x0, so no sample pulls another."""
    objective = Objective(Uniform(), SquaredError(), LossNormalisation())
    x0, x1, u = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.rand(6).double()
    v = (x1 - x0).requires_grad_()
    losses = objective(lambda x_t, t, **_: v, x0, x1, u)
    (slope,) = torch.autograd.grad(losses.total.sum(), v)
    assert slope.abs().max() < 1e-10


def hand_gradient_of_raw(metric: Metric, residual: Tensor) -> Tensor:
    """d loss / d D as one derives it on paper; residual = x0 - D."""
    d = residual[0].numel()
    if isinstance(metric, HighPass):
        return -2 * metric.phi(metric.phi(residual)) / d
    if isinstance(metric, PseudoHuber):
        return -residual / append_dims((residual.square().flatten(1).sum(1) + (metric.c_per_dim * d) ** 2).sqrt(), residual) / d
    return -2 * residual / d


def hand_weight(weight: nn.Module, raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The factor of the gradient of the raw loss."""
    if isinstance(weight, PowerOfTime):
        return t**-weight.power
    if isinstance(weight, EDMWeight):
        sigma = t / (1 - t)
        return (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    if isinstance(weight, LossNormalisation):
        return 1 / (raw + weight.eps)
    return 1 / weight.log_loss(x_t, t).exp().clamp(min=1e-4)


@pytest.mark.parametrize("weight", [*WEIGHTS, LossNormalisation])
@pytest.mark.parametrize("metric", [SquaredError(), HighPass(lam_hpf=3.0), PseudoHuber()], ids=str)
def test_gradient_in_the_velocity_is_the_hand_derivation(metric: Metric, weight) -> None:
    """d total / d v = w dloss/dD dD/dv with dD/dv = -t."""
    generator = torch.Generator().manual_seed(1)
    x0, x1, error = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64, generator=generator)
    u = torch.tensor([1e-6, 0.1, 0.5, 0.9], dtype=torch.float64)
    objective = Objective(Cosh(), metric, weight())
    v = (x1 - x0 + error).requires_grad_()
    losses = objective(lambda x_t, t, **_: v, x0, x1, u)
    (found,) = torch.autograd.grad(losses.total.sum(), v)
    t = losses.t
    residual = append_dims(t, x0) * error  # x0 - D = t (v - (x1 - x0))
    factor = hand_weight(objective.weight, losses.raw, interpolate(x0, x1, t), t) * -t
    expected = append_dims(factor, x0) * hand_gradient_of_raw(metric, residual)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-10)


def test_velocity_weight_is_the_flow_matching_loss_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    x0, x1, v = torch.randn(3, 64, 3, 8, 8, generator=generator)
    objective = Objective(Cosh(), SquaredError(), PowerOfTime(2))
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    losses = objective(lambda x_t, t, **_: v, x0, x1, u)
    assert losses.total.dtype == losses.raw.dtype == torch.float32
    torch.testing.assert_close(losses.total, (v - (x1 - x0)).square().mean((1, 2, 3)), rtol=1e-4, atol=0)


def test_times_are_clamped_in_one_place() -> None:
    objective = Objective(Points(1), SquaredError(), EDMWeight())
    x0, x1, u = torch.randn(8, 2), torch.randn(8, 2), torch.full((8,), 0.5, dtype=torch.float64)
    losses = objective(lambda x_t, t, **_: torch.zeros_like(x_t), x0, x1, u)
    torch.testing.assert_close(losses.t, torch.full((8,), 1 - T_CLAMP))
    assert losses.total.isfinite().all()
    early = Objective(Uniform(), SquaredError(), EDMWeight())(lambda x_t, t, **_: x_t, x0, x1, 0 * u)
    torch.testing.assert_close(early.t, torch.full((8,), T_CLAMP))


def test_network_sees_x_t_t_and_label_and_may_be_low_precision() -> None:
    seen = {}

    def velocity(x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label=None, lam_guid=None) -> Tensor:
        seen.update(x_t=x_t, t=t, label=label)
        return (x1 - x0).bfloat16().requires_grad_()

    x0, x1, label = torch.randn(4, 2), torch.randn(4, 2), torch.arange(4)
    u = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    losses = Objective(Uniform(), SquaredError(), PowerOfTime(2))(velocity, x0, x1, u, label)
    assert (
        isinstance(losses, Losses)
        and losses.total.dtype == torch.float32
        and losses.total.requires_grad
        and not losses.raw.requires_grad
    )
    torch.testing.assert_close(seen["t"], u.float())
    torch.testing.assert_close(seen["x_t"], interpolate(x0, x1, u.float()))
    assert torch.equal(seen["label"], label)


def test_loss_of_gaussian_data_is_the_posterior_variance() -> None:
    """With the exact velocity, E ||x0 - D||^2 per dimension is std^2 t^2 / S(t)^2, at every t."""
    data = Gaussian(0.5, 0.6)
    generator = torch.Generator().manual_seed(3)
    x0 = 0.5 + 0.6 * torch.randn(16, 4000, dtype=torch.float64, generator=generator)
    x1 = torch.randn(16, 4000, dtype=torch.float64, generator=generator)
    u = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    losses = Objective(Exponential(), SquaredError(), PowerOfTime(0))(data, x0, x1, u)
    torch.testing.assert_close(losses.raw, (0.6 * losses.t / data.spread(losses.t)) ** 2, rtol=0.1, atol=0)


def test_high_pass_on_points_is_a_user_error() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(UserError, match=r"dyn\.metric=high_pass"):
        Objective(Uniform(), HighPass(), PowerOfTime(1))(lambda x_t, t, **_: x_t, x, x, torch.full((4,), 0.5).double())


def test_denoiser_of_constant_denoiser_is_the_constant() -> None:
    """The tool of the tests above, tested."""
    D, x_t, t = torch.tensor([[0.7]]).double(), torch.randn(5, 1).double(), torch.linspace(0.1, 1, 5).double()
    torch.testing.assert_close(denoiser_from_velocity(ConstantDenoiser(D)(x_t, t), x_t, t), D.expand(5, 1))
