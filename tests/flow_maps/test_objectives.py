"""The objectives against closed forms, and their gradients against the discrete forms that they are the limits of."""

import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.flow import flow_map, interpolate
from reflow_lab.flow_maps.derivatives import Exact, FiniteDifference
from reflow_lab.flow_maps.objectives import EMD, LMD, Matching, Point, Shortcut, normalised
from reflow_lab.gaussian import Gaussian

DATA = Gaussian(0.4, 0.5)
EXACT, DIFFERENCE = Exact(), FiniteDifference(1e-4)


def points(n=64, seed=0, equal=False):
    """Points on the path, float64, t - s at least 0.05."""
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(n, 2, generator=g, dtype=torch.float64) for _ in range(2))
    d, where = (torch.rand(n, generator=g, dtype=torch.float64) for _ in range(2))
    d = 0.05 + 0.85 * d
    s = where * (0.98 - d)
    t = s if equal else s + d
    x_t = interpolate(0.4 + 0.5 * x0, x1, t)
    return Point(x_t, t, s, DATA.velocity(x_t, t))


class Student(nn.Module):
    """A small network of (x, t, s)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2)).double()

    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        s = t if s is None else s
        return self.layers(torch.cat((x_t, t.expand(len(x_t))[:, None], s.expand(len(x_t))[:, None]), dim=1))


OBJECTIVES = {"EMD": EMD(EXACT), "LMD": LMD(EXACT), "shortcut": Shortcut()}


def direction(objective, student, at, r=1.0):
    return objective(student, at, student(at.x_t, at.t, at.s), DATA.velocity, r)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exact_flow_map_is_right_in_every_sense(name):
    assert direction(OBJECTIVES[name], DATA, points()).abs().max() < 1e-12


@pytest.mark.parametrize("objective", [EMD(DIFFERENCE), LMD(DIFFERENCE)], ids=["EMD", "LMD"])
def test_finite_differences_find_it_right_to_their_step(objective):
    assert direction(objective, DATA, points()).abs().max() < 2e-3
    finer = type(objective)(FiniteDifference(1e-6))
    assert direction(finer, DATA, points()).abs().max() < 2e-5


def test_the_flow_map_is_constant_along_the_ode():
    at = points()
    tangents = (at.v, torch.ones_like(at.t))
    f, df = torch.func.jvp(lambda x, t: DATA.flow_map(x, t, at.s), (at.x_t, at.t), tangents)
    assert df.abs().max() < 1e-12
    ds = torch.func.jvp(lambda s: DATA.flow_map(at.x_t, at.t, s), (at.s,), (torch.ones_like(at.s),))[1]
    torch.testing.assert_close(ds, DATA.velocity(f, at.s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_wrong_flow_map_is_wrong(name):
    assert direction(OBJECTIVES[name], Student(), points()).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["EMD", "shortcut"])
def test_without_a_distance_it_is_flow_matching(name):
    at, student = points(equal=True), Student()
    torch.testing.assert_close(direction(OBJECTIVES[name], student, at), student(at.x_t, at.t, at.t) - at.v)


def gradient(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters())])


def test_emd_is_the_limit_of_matching_a_neighbour_in_t():
    """Gradient of |f(x_t, t, s) - sg f(x_t', t', s)|^2 / 2, t' = t - h (t - s), over h: tends to (t - s)^2 g . dF."""
    student, at = Student(), points()
    errors = []
    for h in (1e-3, 1e-4):
        t = at.t - h * (at.t - at.s)
        x = at.x_t + (t - at.t)[:, None] * at.v
        moved = flow_map(student(x, t, at.s), x, t, at.s).detach()
        f = flow_map(student(at.x_t, at.t, at.s), at.x_t, at.t, at.s)
        discrete = gradient((f - moved).square().sum() / 2 / h, student)
        errors.append(relative(discrete, weighted(EMD(EXACT), student, at)))
    assert errors[1] < 1e-3 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)  # first order


def test_lmd_is_the_limit_of_matching_an_euler_step_of_the_teacher():
    """Gradient of |f(s) - sg(f(s') + (s - s') v(f(s'), s'))|^2 / 2, s' = s + h (t - s), over h: tends to (t - s)^2 g . dF."""
    student, at = Student(), points()
    errors = []
    for h in (1e-3, 1e-4):
        s = at.s + h * (at.t - at.s)
        near = flow_map(student(at.x_t, at.t, s), at.x_t, at.t, s)
        moved = (near + (at.s - s)[:, None] * DATA.velocity(near, s)).detach()
        f = flow_map(student(at.x_t, at.t, at.s), at.x_t, at.t, at.s)
        discrete = gradient((f - moved).square().sum() / 2 / h, student)
        errors.append(relative(discrete, weighted(LMD(EXACT), student, at)))
    assert errors[1] < 1e-3 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def weighted(objective, student, at):
    """The gradient of our loss with weight (t - s)^2 / 2."""
    loss = Matching(objective, c=None, warmup_steps=0, warmup_cap=1.0)(student, at, DATA.velocity, 0).loss
    return gradient(((at.t - at.s) ** 2 * loss).sum() / 2, student)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_loss_is_the_square_of_the_direction_and_pushes_against_it():
    student, at = Student(), points()
    g = normalised(direction(EMD(EXACT), student, at, 0.3), 0.1)
    matching = Matching(EMD(EXACT), c=0.1, warmup_steps=10, warmup_cap=0.99)
    loss = matching(student, at, None, 3).loss
    torch.testing.assert_close(loss, g.square().sum(1))
    expected = gradient((2 * g.detach() * student(at.x_t, at.t, at.s)).sum(), student)
    torch.testing.assert_close(gradient(loss.sum(), student), expected)
    assert (loss < 1).all()  # normalised: |g| < 1


def test_warm_up_rises_to_its_cap():
    matching = Matching(EMD(EXACT), warmup_steps=10_000)
    assert [matching.warmup(step) for step in (0, 5000, 9900, 10**6)] == [0, 0.5, 0.99, 0.99]
    assert Matching(EMD(EXACT), warmup_steps=0).warmup(0) == 0.99
    for wrong in ({"c": 0.0}, {"warmup_steps": -1}, {"warmup_cap": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Matching(EMD(EXACT), **wrong)


@pytest.mark.parametrize("derivative", [EXACT, DIFFERENCE])
def test_both_calls_of_the_student_drop_the_same(derivative):
    """With masks of their own, a difference of two calls over h would be their difference, large."""
    student, at = Student(dropout=0.5), points()
    matching = Matching(EMD(derivative), c=None, warmup_steps=0, warmup_cap=1.0)
    torch.manual_seed(3)
    loss = matching(student, at, None, 0).loss
    after = torch.rand(())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    F = student(at.x_t, at.t, at.s)
    assert torch.equal(after, torch.rand(()))  # as if it had been called once
    ahead = torch.ones(5, dtype=torch.float64) * 1e-6
    torch.set_rng_state(state)
    moved = student(at.x_t + ahead[:1] * at.v, at.t + ahead[:1], at.s)
    g = (F - at.v) + (at.t - at.s)[:, None] * (moved - F) / ahead[0]
    torch.testing.assert_close(loss, g.square().sum(1), rtol=1e-2, atol=1e-4)


def test_meanflow_is_emd_with_the_pairs_own_velocity():
    """Its mean over pairs at one place is EMD's g with the marginal velocity, since g is affine in v but for F's derivative."""
    student, at = Student(), points()
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    both = [direction(EMD(EXACT), student, at._replace(v=at.v + sign * noise)) for sign in (1, -1)]
    torch.testing.assert_close((both[0] + both[1]) / 2, direction(EMD(EXACT), student, at))
