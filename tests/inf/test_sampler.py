from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX, T_MIN
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import EDM, Grid, LogitUniform, Sigmoid, Uniform
from reflow_lab.inf.sampler import CountCalls, inversion_times, invert, sample, sampling_times
from reflow_lab.inf.solvers import DPM, Adaptive, Euler, Heun, HeunSigma, RFPlusPlus, Solver

CONF = Path(__file__).parents[2] / "conf"
DATA = Gaussian(mean=0.3, std=0.5)
SOLVERS = [Euler(), Heun(), HeunSigma(), DPM()]


def images() -> Tensor:
    return DATA.mean + DATA.std * torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(32, 2)


@pytest.mark.parametrize("grid", [Uniform(), Sigmoid(), EDM(), LogitUniform()], ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("odd", [0, 1])
def test_forward_then_backward_returns_the_image_to_solver_order(grid: Grid, solver: Solver, odd: int) -> None:
    errors = []
    for nfe in (20 + odd, 240 + odd):
        x1 = invert(DATA, images(), solver=solver, grid=grid, nfe=nfe)
        back = sample(DATA, x1, solver=solver, grid=grid, nfe=nfe)
        errors.append((back - images()).abs().max().item())
    first_order = isinstance(solver, Euler)
    assert errors[1] < (0.06 if first_order else 1e-3)
    assert errors[0] / errors[1] > (8 if first_order else 40)


def test_forward_pairs_are_the_flows_own_noise() -> None:
    x1 = invert(DATA, images(), solver=DPM(), grid=Sigmoid(), nfe=400)
    start, ends = (1 - T_MIN) * images(), torch.tensor([T_MIN, T_MAX], dtype=torch.float64)
    torch.testing.assert_close(x1, DATA.flow_map(start, ends[0], ends[1]) / T_MAX, rtol=0, atol=5e-4)


@pytest.mark.parametrize("t_max", [T_MAX, 1.0])
@pytest.mark.parametrize("way", [sample, invert])
def test_every_nfe_is_exact_and_counted(way, t_max: float) -> None:  # type: ignore[no-untyped-def]
    for solver in [*SOLVERS, RFPlusPlus()] if way is sample else SOLVERS:
        for nfe in range(1, 21):
            counted = CountCalls(DATA)
            x = way(counted, images(), solver=solver, grid=Sigmoid(), nfe=nfe, t_max=t_max)
            assert x.isfinite().all()
            assert (counted.calls, counted.nfe(32)) == (nfe, nfe)


@pytest.mark.parametrize("way", [sample, invert])
def test_labels_reach_the_velocity_and_a_sample_does_not_depend_on_its_batch(way) -> None:  # type: ignore[no-untyped-def]
    def velocity(x_t: Tensor, t: Tensor, s: object = None, *, label: Tensor, lam_guid: object = None) -> Tensor:
        return DATA.velocity(x_t, t) + label[:, None]

    label = torch.arange(32)
    whole = way(velocity, images(), solver=DPM(), grid=Sigmoid(), nfe=9, label=label)
    part = way(velocity, images()[5:9], solver=DPM(), grid=Sigmoid(), nfe=9, label=label[5:9])
    torch.testing.assert_close(part, whole[5:9], rtol=0, atol=1e-12)


def test_samples_have_the_data_law() -> None:
    x1 = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)[:, None]
    x0 = sample(DATA, x1, solver=DPM(), grid=Sigmoid(), nfe=199)
    assert x0.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x0.std().item() == pytest.approx(0.5, abs=0.01)


def test_networks_run_in_inference_mode_and_samples_can_be_trained_on() -> None:
    modes = []

    def velocity(x_t: Tensor, t: Tensor, s: object = None, *, label: object = None, lam_guid: object = None) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return DATA.velocity(x_t, t)

    x0 = sample(velocity, images(), solver=Euler(), grid=Uniform(), nfe=3)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (scale * x0).sum().backward()
    assert modes == [True] * 3
    torch.testing.assert_close(scale.grad, x0.sum())


def test_no_samples_are_no_samples() -> None:
    assert sample(DATA, torch.empty(0, 2), solver=DPM(), grid=Sigmoid(), nfe=9).shape == (0, 2)


def test_adaptive_goes_both_ways() -> None:
    solver = Adaptive(1e-8, 1e-8)
    x1 = invert(DATA, images(), solver=solver, grid=Sigmoid(), nfe=3)
    torch.testing.assert_close(sample(DATA, x1, solver=solver, grid=Sigmoid(), nfe=3), images(), rtol=0, atol=5e-5)


def test_times_of_nine_calls_are_five_steps() -> None:
    assert sampling_times(DPM(), Sigmoid(), 9).shape == (6,)
    assert inversion_times(DPM(), Sigmoid(), 10)[0] == T_MIN


@pytest.mark.parametrize("way", [sample, invert])
@pytest.mark.parametrize(
    ("key", "value"),
    [("nfe", 0), ("nfe", -1), ("nfe", 2.5), ("nfe", True), ("t_max", 0), ("t_max", 1.5), ("t_max", -1.0)],
)
def test_bad_values_are_named(way, key: str, value: object) -> None:  # type: ignore[no-untyped-def]
    arguments = {"solver": Euler(), "grid": Uniform(), "nfe": 4} | {key: value}
    with pytest.raises(UserError, match=f"^{key}={value}: "):
        way(DATA, images(), **arguments)


@pytest.mark.parametrize("member", sorted(path.stem for path in (CONF / "inf/grid").glob("*.yaml")))
def test_every_grid_config_makes_a_grid(member: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=["+inf=baseline", f"inf/grid={member}"])
    times = instantiate(config.inf.grid)(5, T_MAX)
    assert times.shape == (6,)


@pytest.mark.parametrize("member", sorted(path.stem for path in (CONF / "inf/solver").glob("*.yaml")))
def test_every_solver_config_makes_a_solver(member: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=["+inf=improved", f"inf/solver={member}"])
    x0 = sample(DATA, images(), solver=instantiate(config.inf.solver), grid=instantiate(config.inf.grid), nfe=9)
    assert x0.isfinite().all()


def test_presets_are_the_papers_stages() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = [instantiate(compose(overrides=[f"+inf={name}"]).inf) for name in ("baseline", "improved")]
    assert [(inf.grid, inf.solver) for inf in made] == [(Uniform(), Heun()), (Sigmoid(10.0), DPM(0.4))]
