import math

import pytest
import torch

from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX, T_MIN, sigma_from_t
from reflow_lab.inf.grids import EDM, Grid, Listed, LogitUniform, Sigmoid, Uniform, ascending

GRIDS = [Uniform(), Sigmoid(10), Sigmoid(20), Sigmoid(60), EDM(), LogitUniform()]


@pytest.mark.parametrize(
    ("grid", "t_max", "published"),
    [
        (Sigmoid(10), 1.0, [1, 0.9587, 0.7342, 0.2658, 0.0413, 0]),
        (Sigmoid(20), 1.0, [1, 0.9976, 0.8808, 0.1192, 0.0024, 0]),
        (EDM(rho=7), T_MAX, [0.9877, 0.9460, 0.7155, 0.1451, 0.0020, 0]),
        (Uniform(), 0.9, [0.9, 0.72, 0.54, 0.36, 0.18, 0]),
    ],
)
def test_published_values_at_five_steps(grid: Grid, t_max: float, published: list[float]) -> None:
    assert grid(5, t_max).tolist() == pytest.approx(published, abs=5.1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 40, 500])
@pytest.mark.parametrize("t_max", [0.3, T_MAX, 1 - 1e-5])
def test_descends_strictly_from_t_max_to_zero(grid: Grid, num_steps: int, t_max: float) -> None:
    times = grid(num_steps, t_max)
    assert times.shape == (num_steps + 1,)
    assert times.dtype == torch.float64
    assert times[0] == t_max
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("kappa", [0, 1e-300, 1e-12, 1e-6])
def test_sigmoid_of_tiny_kappa_is_uniform(kappa: float) -> None:
    torch.testing.assert_close(Sigmoid(kappa)(7, 0.9), Uniform()(7, 0.9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kappa", [0.5, 10, 20])
def test_sigmoid_is_its_formula_and_symmetric(kappa: float) -> None:
    s = (kappa * (torch.linspace(1, 0, 10, dtype=torch.float64) - 0.5)).sigmoid()
    times = Sigmoid(kappa)(9, 1.0)
    torch.testing.assert_close(times, (s - s[-1]) / (s[0] - s[-1]), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(times + times.flip(0), torch.ones(10, dtype=torch.float64))


def test_edm_is_its_formula() -> None:
    sigma = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert sigma_from_t(EDM()(18, T_MAX)).tolist() == pytest.approx([*sigma, 0], rel=1e-9)


def test_logit_uniform_is_the_limit_of_edm() -> None:
    times = LogitUniform()(9, T_MAX)
    assert times[:-1].logit().diff().std() < 1e-12
    assert times[-2].item() == pytest.approx(T_MIN, rel=1e-12)
    torch.testing.assert_close(EDM(rho=1e7)(9, T_MAX), times, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [EDM(), LogitUniform()], ids=repr)
@pytest.mark.parametrize("t_max", [1.0, 0.001])
def test_grids_in_sigma_refuse_infinite_or_too_little_noise(grid: Grid, t_max: float) -> None:
    with pytest.raises(UserError, match=f"^t_max={t_max}: "):
        grid(5, t_max)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Sigmoid(-1), "kappa=-1"),
        (lambda: Sigmoid(math.nan), "kappa=nan"),
        (lambda: Sigmoid(100), "kappa=100"),
        (lambda: EDM(rho=0), "rho=0"),
        (lambda: EDM(sigma_min=0), "sigma_min=0"),
        (lambda: LogitUniform(sigma_min=-1), "sigma_min=-1"),
        (lambda: Listed([1, 0.5, 0.5, 0]), "times"),
        (lambda: Listed([0.9, 0.5, 0]), "times"),
        (lambda: Listed([1, 0.5]), "times"),
        (lambda: Listed([]), "times"),
        (lambda: Listed([1, 0.5, 0])(3, 1.0), "grid.times"),
    ],
)
def test_bad_parameters_are_named(make: object, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}"):
        make()  # type: ignore[operator]


def test_listed_are_fractions_of_t_max() -> None:
    assert Listed([1, 0.25, 0])(2, 0.8).tolist() == [0.8, 0.2, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
def test_ascending_climbs_over_the_grids_own_points(grid: Grid, num_steps: int) -> None:
    times = ascending(grid, num_steps, T_MAX)
    assert times.shape == (num_steps + 1,)
    assert times[0] == T_MIN
    assert times[-1] == T_MAX
    assert (times.diff() > 0).all()
    downward = [set(grid(size, T_MAX).tolist()) for size in range(num_steps, 3 * num_steps + 2)]
    assert any(set(times[1:].tolist()) <= points for points in downward)


def test_ascending_uniform_and_edm_reverse_the_downward_grid() -> None:
    assert ascending(Uniform(), 4, 0.8)[1:].tolist() == Uniform()(4, 0.8).flip(0)[1:].tolist()
    torch.testing.assert_close(ascending(EDM(), 17, T_MAX), EDM()(18, T_MAX)[:-1].flip(0), rtol=1e-12, atol=0)


def test_ascending_refuses_what_cannot_climb() -> None:
    with pytest.raises(UserError, match=r"^t_max=0\.001: "):
        ascending(Uniform(), 4, 0.001)
    with pytest.raises(UserError, match=r"^grid="):
        ascending(lambda num_steps, t_max: torch.tensor([t_max, 0.0], dtype=torch.float64), 4, 0.9)
