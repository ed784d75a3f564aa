"""A flow map's training objective: what it draws, what it asks of whom, what it refuses."""

import functools

import pytest
import torch

from reflow_lab.dyn.times import LogitNormal, Uniform
from reflow_lab.errors import UserError
from reflow_lab.flow import interpolate
from reflow_lab.flow_maps.derivatives import Exact
from reflow_lab.flow_maps.distillation import Distillation
from reflow_lab.flow_maps.objectives import EMD, Consistency, Matching
from reflow_lab.flow_maps.times import DistanceTimes, SortedTimes, ToData
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.guidance import Guided
from reflow_lab.networks.mlp import MLP
from reflow_lab.networks.preconditioning import Preconditioned

DATA = Gaussian(0.3, 0.5)
TIMES = DistanceTimes(LogitNormal(-0.8, 1.0))
PLAIN = functools.partial(Matching, c=None, warmup_steps=0, warmup_cap=1.0)


def drawn(n=64):
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(n, 2, generator=g, dtype=torch.float64) for _ in range(2))
    return 0.3 + 0.5 * x0, x1, torch.rand(n, 4, generator=g, dtype=torch.float64)


class Told:
    """A velocity that keeps what it is told."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, x_t, t, s=None, *, label=None, lam_guid=None):
        self.calls.append({"t": t, "s": s, "label": label, "lam_guid": lam_guid})
        return self.velocity(x_t, t, s)


def test_the_exact_flow_map_of_the_teacher_has_nothing_to_learn():
    x0, x1, u = drawn()
    losses = Distillation(PLAIN(EMD(Exact())), TIMES, DATA)(DATA, x0, x1, u)
    assert losses.total.max() < 1e-20 and losses.raw.max() < 1e-20


def test_without_a_teacher_it_learns_from_the_data():
    x0, x1, u = drawn()
    fixed = lambda x_t, t, s=None, **_: torch.zeros_like(x_t)  # noqa: E731
    losses = Distillation(PLAIN(EMD(Exact())), TIMES, None)(fixed, x0, x1, u)
    torch.testing.assert_close(losses.total, (x1 - x0).square().sum(1))


def test_the_student_is_told_the_strength_by_which_its_teacher_is_guided():
    x0, x1, u = drawn()
    weak = Gaussian(0.0, 1.0)
    student, teacher = Told(lambda x, t, s: torch.zeros_like(x)), Told(DATA)
    label = torch.arange(64)
    objective = Distillation(PLAIN(EMD(Exact())), TIMES, Guided(teacher, weak, 1.0), (1.0, 3.0))
    losses = objective(student, x0, x1, u, label)
    lam = 1 + 2 * u[:, 3]
    t, s = TIMES(u[:, :3])
    x_t = interpolate(x0, x1, t)
    v = lam[:, None] * DATA.velocity(x_t, t) + (1 - lam[:, None]) * weak.velocity(x_t, t)
    torch.testing.assert_close(losses.total, v.square().sum(1))
    for told in student.calls[:1]:
        torch.testing.assert_close(told["lam_guid"], lam)
        torch.testing.assert_close(told["s"], s)
        assert torch.equal(told["label"], label)
    assert torch.equal(teacher.calls[0]["label"], label)


def test_the_teachers_weights_are_neither_trained_nor_saved():
    teacher = Preconditioned(MLP(2, width=8))
    objective = Distillation(PLAIN(EMD(Exact())), TIMES, teacher)
    assert not list(objective.parameters()) and not objective.state_dict()
    x0, x1, u = (z.float() for z in drawn())
    student = Preconditioned(MLP(2, width=8, jumps=True))
    objective(student, x0, x1, u.double()).total.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


class Upward:
    """A law of a user's own that is wrong."""

    def __call__(self, u):
        return u[:, 0] / 2, u[:, 0]


@pytest.mark.parametrize(
    ("objective", "times", "said"),
    [
        (EMD(Exact()), Upward(), r"flow_map\.times=t=.*1 >= t >= s >= 0"),
        (Consistency(Exact()), SortedTimes(Uniform()), "Consistency only jumps to data"),
    ],
    ids=["upward", "consistency"],
)
def test_times_that_do_not_suit_are_refused_before_any_step(objective, times, said):
    with pytest.raises(UserError, match=said):
        Distillation(PLAIN(objective), times, DATA)


def test_a_consistency_model_is_emd_to_data():
    x0, x1, u = drawn()
    times, student = ToData(LogitNormal(-0.8, 1.6)), Gaussian(0.1, 0.7)
    found = [Distillation(PLAIN(kind(Exact())), times, DATA)(student, x0, x1, u).total for kind in (EMD, Consistency)]
    assert torch.equal(*found) and found[0].min() > 0


@pytest.mark.parametrize("lam_guid", [(3.0, 1.0), (-1.0, 1.0)], ids=["descending", "negative"])
def test_strengths_that_are_none_are_refused(lam_guid):
    with pytest.raises(UserError, match=r"flow_map\.guidance\.lam_guid=.*0 <= low <= high"):
        Distillation(PLAIN(EMD(Exact())), TIMES, DATA, lam_guid)
