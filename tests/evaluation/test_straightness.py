import pytest
import torch

from reflow_lab.evaluation.straightness import Trace, sample_straightness, straightness
from reflow_lab.flow import T_MAX
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import Sigmoid, Uniform
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import DPM, Adaptive, Euler, Solver

DATA = Gaussian(mean=0.3, std=0.5)


def noise() -> torch.Tensor:
    return torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(32, 2)


def test_a_straight_line_has_zero_on_any_grid() -> None:
    times = Sigmoid()(9, 1.0).tolist()
    states = [3 + t * noise() for t in times]
    assert straightness(states, times).abs().max() < 1e-20


def test_a_bent_line_by_hand() -> None:
    """From 0 by slope 3 over half the time, then by slope 1: chord 2, deviation 1; the second dimension stays."""
    states = [torch.tensor([[3 * 0.5 + 0.5, 1.0]]), torch.tensor([[3 * 0.5, 1.0]]), torch.tensor([[0.0, 1.0]])]
    assert straightness(states, [1.0, 0.5, 0.0]).tolist() == [0.5]
    assert straightness(states[::-1], [0.0, 0.5, 1.0]).tolist() == [0.5]


def closed_form(x1: torch.Tensor) -> torch.Tensor:
    """The integral over t of |v - chord|^2 along x_t = mean (1-t) + x1 S(t), by the midpoint rule, from t = 1."""
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    slope = (t - (1 - t) * DATA.std**2) / DATA.spread(t)
    return (x1.square() * (slope - (1 - DATA.std)).square().mean()).mean(1)


@pytest.mark.parametrize(
    ("solver", "grid", "nfe"),
    [(Euler(), Uniform(), 2000), (DPM(), Sigmoid(5), 399), (Adaptive(1e-9, 1e-9), Sigmoid(5), 300)],
    ids=lambda value: repr(value),
)
def test_many_steps_give_lius_integral_whatever_the_grid(solver: Solver, grid: Sigmoid, nfe: int) -> None:
    x0, values = sample_straightness(DATA, noise(), solver=solver, grid=grid, nfe=nfe, t_max=1.0, batch_size=10)
    assert values.shape == (32,)
    torch.testing.assert_close(values, closed_form(noise()), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(x0, DATA.mean + DATA.std * noise(), rtol=0, atol=5e-3)


def test_samples_are_the_samplers_and_labels_follow_their_batch() -> None:
    def velocity(x_t, t, s=None, *, label, lam_guid=None):  # type: ignore[no-untyped-def]
        return DATA.velocity(x_t, t) * (label[:, None] + 1)

    label = torch.arange(32) % 2
    x0, values = sample_straightness(velocity, noise(), solver=DPM(), grid=Sigmoid(), nfe=9, label=label, batch_size=7)
    torch.testing.assert_close(x0, sample(velocity, noise(), solver=DPM(), grid=Sigmoid(), nfe=9, label=label))
    assert (values > 0).all()


def test_one_step_is_straight_and_a_trace_keeps_every_state() -> None:
    _, values = sample_straightness(DATA, noise(), solver=Euler(), grid=Uniform(), nfe=1)
    assert values.abs().max() < 1e-20
    trace = Trace()
    sample(DATA, noise(), solver=DPM(), grid=Sigmoid(), nfe=9, callback=trace)
    assert len(trace.states) == len(trace.times) == 5
    assert trace.times[0] == T_MAX
