import pytest
import torch

from reflow_lab.errors import UserError
from reflow_lab.evaluation.curvature import along_time, joined, nodes
from reflow_lab.evaluation.straightness import sample_straightness
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import Sigmoid
from reflow_lab.inf.solvers import DPM

DATA = Gaussian(mean=0.3, std=0.5)


def noise() -> torch.Tensor:
    return torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(32, 2)


def slope(t: torch.Tensor) -> torch.Tensor:
    """S'(t), where a path is x_t = (1 - t) mean + x1 S(t)."""
    return (t - (1 - t) * DATA.std**2) / DATA.spread(t)


@pytest.mark.parametrize("num_bins, per_bin", [(10, 40), (100, 4)])
def test_a_gaussians_paths_bend_as_its_closed_form_says(num_bins: int, per_bin: int) -> None:
    """v - chord = x1 (S' - (1 - std)) and dv/dt = x1 S'' with S'' = std^2 / S^3."""
    found = along_time(DATA, noise(), num_bins=num_bins, per_bin=per_bin, t_max=1.0)
    t = nodes(num_bins, per_bin, 1.0).flip(0)
    size, length = noise().square().mean(1)[:, None], noise().square().mean(1).sqrt()[:, None]
    deviation = (size * (slope(t) - (1 - DATA.std)).square()).reshape(32, num_bins, per_bin).mean(2)
    acceleration = (length * DATA.std**2 / DATA.spread(t) ** 3).reshape(32, num_bins, per_bin).mean(2)
    torch.testing.assert_close(found.deviation, deviation, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.acceleration, acceleration, rtol=2e-4, atol=0)
    torch.testing.assert_close(found.t, (torch.arange(num_bins, dtype=torch.float64) + 0.5) / num_bins)


def test_its_mean_is_the_straightness_of_many_steps() -> None:
    found = along_time(DATA, noise(), num_bins=50, per_bin=4, t_max=0.9)
    _, expected = sample_straightness(DATA, noise(), solver=DPM(), grid=Sigmoid(5), nfe=599, t_max=0.9)
    torch.testing.assert_close(found.deviation.mean(1), expected, rtol=3e-3, atol=1e-6)


def test_straight_paths_neither_deviate_nor_turn() -> None:
    """A single image: x_t = (1 - t) x0 + t x1."""
    found = along_time(Gaussian(mean=0.7, std=0.0), noise(), num_bins=5, per_bin=2)
    assert found.deviation.abs().max() < 1e-20 and found.acceleration.abs().max() < 1e-10


def test_batches_and_labels() -> None:
    def velocity(x_t, t, s=None, *, label, lam_guid=None):  # type: ignore[no-untyped-def]
        return DATA.velocity(x_t, t) * (label[:, None] + 1)

    label = torch.arange(32) % 2
    whole = along_time(velocity, noise(), num_bins=4, label=label)
    parts = joined([along_time(velocity, noise()[rows], num_bins=4, label=label[rows]) for rows in torch.arange(32).split(10)])
    torch.testing.assert_close(parts.deviation, whole.deviation)
    torch.testing.assert_close(parts.acceleration, whole.acceleration)
    assert whole.deviation.shape == (32, 4)
    assert not torch.allclose(whole.deviation, along_time(velocity, noise(), num_bins=4, label=1 - label).deviation)


def test_too_few_points_have_no_second_derivative() -> None:
    with pytest.raises(UserError, match=r"^per_bin=2: "):
        along_time(DATA, noise(), num_bins=1, per_bin=2)
