import pytest
import torch

from reflow_lab.dyn.weights import EDMWeight, LearnedNormalisation, LossNormalisation, PowerOfTime
from reflow_lab.errors import UserError

T = torch.tensor([1e-5, 0.1, 0.5, 0.9, 1 - 1e-5], dtype=torch.float64)
LOSS = torch.tensor([1e-9, 0.01, 0.2, 1.0, 3.0], dtype=torch.float64)
X_T = torch.zeros(5, 2, dtype=torch.float64)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_power_of_time(power: int) -> None:
    torch.testing.assert_close(PowerOfTime(power)(LOSS, X_T, T), LOSS / T**power)


def test_edm_weight_is_its_formula_and_finite() -> None:
    sigma = T / (1 - T)
    expected = LOSS * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(EDMWeight()(LOSS, X_T, T), expected)
    assert EDMWeight()(LOSS.float(), X_T, T.float()).isfinite().all()


def test_loss_normalisation_has_the_gradient_of_the_logarithm() -> None:
    loss = LOSS.clone().requires_grad_()
    total = LossNormalisation(eps=1e-4)(loss, X_T, T)
    total.sum().backward()
    torch.testing.assert_close(total.detach(), LOSS / (LOSS + 1e-4))
    torch.testing.assert_close(loss.grad, 1 / (LOSS + 1e-4))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 16, 16), (2,)])
def test_learned_normalisation_starts_at_weight_one(shape: tuple[int, ...]) -> None:
    weight = LearnedNormalisation(channels=shape[0])
    x_t, t, loss = torch.randn(5, *shape), T.float(), LOSS.float().requires_grad_()
    assert weight.log_loss(x_t, t).abs().max() == 0
    total = weight(loss, x_t, t)
    torch.testing.assert_close(total.detach(), (loss + loss.log() ** 2).detach())
    total.sum().backward()
    torch.testing.assert_close(loss.grad, torch.ones(5))  # nothing through the weight or the regression
    assert weight.out.bias.grad.abs() > 0


def test_learned_normalisation_divides_by_the_clamped_exponential() -> None:
    weight = LearnedNormalisation(channels=2).double()
    for log_loss, divisor in ((-3.0, torch.tensor(-3.0).double().exp()), (-20.0, 1e-4)):
        torch.nn.init.constant_(weight.out.bias, log_loss)
        expected = LOSS / divisor + (LOSS.log() - log_loss) ** 2
        torch.testing.assert_close(weight(LOSS, X_T, T), expected)


def test_learned_normalisation_survives_a_loss_of_zero() -> None:
    total = LearnedNormalisation(channels=2)(torch.zeros(5), X_T.float(), T.float())
    total.sum().backward()
    assert total.isfinite().all()


def test_learned_normalisation_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        weight = LearnedNormalisation(channels=3)
        assert weight.log_loss(torch.empty(2, 3, 32, 32), torch.empty(2)).shape == (2,)
    assert [block.conv.out_channels for block in weight.blocks] == [32, 64, 128, 256]
    assert weight.lr == 1e-3


def test_learned_normalisation_is_calibrated_after_a_few_hundred_steps() -> None:
    """The log loss depends on t and on where x_t lies, with noise of its own; u must find its mean."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x_t = torch.randn(256, 2, generator=generator)
        t = torch.rand(256, generator=generator).clamp(0.01, 0.99)
        mean = -3 + 2 * t + 0.5 * (x_t[:, 0] > 0)
        return x_t, t, mean, (mean + 0.3 * torch.randn(256, generator=generator)).exp()

    torch.manual_seed(0)
    weight = LearnedNormalisation(channels=2)
    optimiser = torch.optim.Adam(weight.parameters(), lr=weight.lr)
    for _ in range(300):
        x_t, t, _, loss = batch()
        optimiser.zero_grad()
        weight(loss, x_t, t).mean().backward()
        optimiser.step()
    x_t, t, mean, loss = batch()
    with torch.no_grad():
        miss = weight.log_loss(x_t, t) - mean
    assert miss.abs().mean() < 0.15
    for low, high in ((0, 0.3), (0.3, 0.7), (0.7, 1)):
        assert miss[(t > low) & (t < high)].mean().abs() < 0.1


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: LossNormalisation(eps=0.0), "dyn.weight.eps=0.0"),
        (lambda: EDMWeight(sigma_data=-1.0), "dyn.weight.sigma_data=-1.0"),
        (lambda: LearnedNormalisation(channels=1, eps=0.0), "dyn.weight.eps=0.0"),
    ],
)
def test_bad_parameters_are_named(make, key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()
