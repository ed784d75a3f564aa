import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reflow_lab import gaussian
from reflow_lab.data.toys import TwoMoons
from reflow_lab.errors import UserError
from reflow_lab.lrn.couplings import assignment
from reflow_lab.lrn.projection import (
    Critic,
    CriticMethod,
    HeldOut,
    Projection,
    Round,
    Side,
    Sinkhorn,
    SinkhornPotential,
    Step,
    directions,
    dual_value,
    fit,
    masses,
    prox,
    self_potential,
    sinkhorn_potentials,
    sliced_w2_squared,
    slope,
    squared_cost,
    w2_squared_exact,
)
from reflow_lab.noise import normal

SEED = 3
MOONS = TwoMoons()
STRETCH, SHIFT = torch.tensor([0.7, 0.8]), torch.tensor([0.4, -0.2])
SINKHORN = Sinkhorn(batch_size=500, num_iterations=10, num_steps=2, lam_max=4)
CRITIC = CriticMethod(batch_size=128, num_iterations=50, pool_size=500, lr=2e-3, widths=(64, 64), num_steps=2, lam_max=4)
METHODS = pytest.mark.parametrize("method", [SINKHORN, CRITIC], ids=["sinkhorn", "critic"])


def noise(stream):
    return lambda step, n: (normal(SEED, stream, np.arange(step * n, (step + 1) * n), (2,)), None)


def moons(stream, labelled=False):
    def draw(step, n):
        points, label = MOONS.draw(stream, np.arange(step * n, (step + 1) * n))
        return points.float(), label if labelled else None

    return draw


def biased(draw):
    """The gradient of a convex function, so that it is the optimal map and its mean squared displacement W2^2."""

    def drawn(step, n):
        x, label = draw(step, n)
        return x * STRETCH + SHIFT, label

    return drawn


def side(law, distance=w2_squared_exact, num=400, **kwargs):
    x, label = biased(law("heldout", **kwargs))(0, num)
    heldout = HeldOut(x, label, law("reference", **kwargs)(0, num)[0], law("floor", **kwargs)(0, num)[0], distance)
    return Side(biased(law("source", **kwargs)), law("target", **kwargs), heldout, SEED, 2 if label is not None else 0)


def last(method, side):
    return list(fit(method, side))[-1]


def uniform_logs(*sizes):
    return [torch.full((n,), -math.log(n)) for n in sizes]


# Sinkhorn


def test_the_plan_is_that_of_another_solver():
    ot = pytest.importorskip("ot")
    x, y = moons("x")(0, 60)[0].double(), noise("y")(0, 80)[0].double()
    cost, (a, b) = squared_cost(x, y), (log.double() for log in uniform_logs(60, 80))
    f, g = sinkhorn_potentials(cost, a, b, 1.0, 300)
    plan = torch.exp(a[:, None] + b + f[:, None] + g - cost)
    expected = ot.sinkhorn(a.exp().numpy(), b.exp().numpy(), cost.numpy(), 1.0, stopThr=1e-10, warn=False)
    torch.testing.assert_close(plan, torch.from_numpy(expected), atol=1e-9, rtol=1e-6)


def test_the_plan_has_its_masses_and_the_self_plan_too():
    x, y = moons("x")(0, 50)[0].double(), noise("y")(0, 70)[0].double()
    a, b = (log.double() for log in uniform_logs(50, 70))
    f, g = sinkhorn_potentials(squared_cost(x, y), a, b, 0.3, 300)
    plan = torch.exp(a[:, None] + b + (f[:, None] + g - squared_cost(x, y)) / 0.3)
    torch.testing.assert_close(plan.sum(0), b.exp())
    torch.testing.assert_close(plan.sum(1), a.exp(), atol=1e-7, rtol=1e-5)
    f = self_potential(squared_cost(x, x), a, 0.3, 30)
    own = torch.exp(a[:, None] + a + (f[:, None] + f - squared_cost(x, x)) / 0.3)
    torch.testing.assert_close(own.sum(1), a.exp(), atol=1e-9, rtol=1e-6)


def test_with_little_blur_the_gradient_is_the_displacement_of_the_exact_assignment():
    y, z = noise("y")(0, 40)[0].double(), 3 + noise("z")(0, 40)[0].double()
    potential = SinkhornPotential.of(y, z, None, None, eps=2e-3, num_iterations=3000)
    g = potential.gradient(y, None)
    assert g.square().sum(1).mean().item() == pytest.approx(w2_squared_exact(y, z), rel=1e-3)
    assert (y + g - z[assignment(y, z)]).square().sum(1).mean() < 1e-3


def test_the_debiased_gradient_vanishes_at_the_target_and_finds_a_shift_at_any_blur():
    y = noise("y")(0, 100)[0]
    same = SinkhornPotential.of(y, y, None, None, eps=1.0, num_iterations=100)
    assert same.gradient(y, None).abs().max() < 1e-3
    shifted = SinkhornPotential.of(y, y + SHIFT, None, None, eps=1.0, num_iterations=100)
    assert (shifted.gradient(y, None) - SHIFT).abs().max() < 2e-3


def test_masses_follow_the_classes_of_what_is_moved():
    y, z = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 2])
    a, b = masses(y, z, 4, 4)
    torch.testing.assert_close(a, torch.full((4,), 0.25))
    torch.testing.assert_close(b, torch.tensor([0.75, 0.125, 0.125, 0]))
    a, b = masses(torch.tensor([0, 3]), torch.tensor([0, 1]), 2, 2)
    torch.testing.assert_close(torch.stack((a, b)), torch.tensor([[1.0, 0], [1, 0]]))


def test_a_class_without_target_samples_is_refused():
    labelled = side(moons, labelled=True)

    def one_class(step, n):
        return labelled.target(step, n)[0], torch.zeros(n).long()

    with pytest.raises(UserError, match=r"^projection\.batch_size=500: holds no target sample of classes \[1\]"):
        list(fit(SINKHORN, replace(labelled, target=one_class)))


# Critic


def test_the_critic_measures_a_small_shift_and_points_along_it():
    shift = torch.tensor([0.3, -0.2])
    shifted = Side(noise("y"), lambda step, n: (noise("z")(step, n)[0] + shift, None), side(noise).heldout, SEED)
    method = CriticMethod(batch_size=512, num_iterations=80, pool_size=4000, lr=2e-3, widths=(64, 64))
    potential = method.potential(shifted, 0, shifted.source, None)
    y, z = noise("fresh")(0, 8000)[0], noise("fresh")(1, 8000)[0] + shift
    assert dual_value(potential.critic, y, None, z, None).item() == pytest.approx(shift.square().sum().item(), rel=0.25)
    g = potential.gradient(y, None)
    assert (g.mean(0) - shift).abs().max() < 0.04 and (g - shift).square().sum(1).mean() < 0.15 * shift.square().sum()


def test_the_dual_value_of_a_linear_critic_in_closed_form():
    critic = Critic((2,), 0, (8,))
    critic.shift.data, y = torch.tensor([0.5, 1.0]), noise("y")(0, 64)[0]
    value = dual_value(critic, y, None, y + SHIFT, None)
    torch.testing.assert_close(value, 2 * critic.shift @ SHIFT - critic.shift.square().sum())


@pytest.mark.parametrize("shape", [(2,), (1, 28, 28), (3, 16, 16)])
def test_critics_begin_at_zero_and_can_be_differentiated_twice(shape):
    critic, y, label = Critic(shape, 3, (8, 8)), torch.randn(6, *shape), torch.arange(6) % 3
    assert critic(y, label).abs().max() == 0
    torch.nn.init.normal_(critic.value.weight)
    torch.nn.init.normal_(critic.embedding.weight)
    assert not torch.allclose(critic(y, label), critic(y, label.roll(1)))
    slope(critic, y, label, create_graph=True).square().sum().backward()
    first = next(critic.parameters())
    assert first.grad.abs().max() > 0


def test_a_samples_slope_is_its_own():
    critic, y = Critic((1, 16, 16), 0, (8, 8)), torch.randn(5, 1, 16, 16)
    torch.nn.init.normal_(critic.value.weight)
    torch.testing.assert_close(slope(critic, y, None)[:1], slope(critic, y[:1], None))


# The map


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0, 50.0])
def test_with_the_displacement_of_a_shift_a_step_lands_on_the_geodesic(lam):
    class Toward:
        def gradient(self, y, label):
            return SHIFT.expand_as(y)

    x = noise("x")(0, 5)[0]
    torch.testing.assert_close(prox(x, None, [Step(lam, Toward())]), x + lam / (1 + lam) * SHIFT)


def test_the_map_is_the_gaussians_optimal_one():
    """From N(SHIFT, STRETCH^2) to N(0, 1): y = (x - SHIFT) / STRETCH."""
    made = last(Sinkhorn(batch_size=800, num_iterations=10, num_steps=2, lam_max=16, tolerance=0.1), side(noise))
    x = biased(noise("fresh"))(0, 2000)[0]
    bound = gaussian.w2_squared(SHIFT.double(), STRETCH.diag().double() ** 2, torch.zeros(2).double(), torch.eye(2).double())
    y, expected = made(x), (x - SHIFT) / STRETCH
    assert (y - expected).square().sum(1).mean() < 0.1 * bound
    assert (y - x).square().sum(1).mean().item() == pytest.approx(bound.item(), rel=0.35)


@METHODS
@pytest.mark.parametrize("law", [moons, pytest.param(noise, marks=pytest.mark.slow)])
def test_a_biased_marginal_is_met_at_nearly_the_least_transport(law, method):
    """An empirical W2^2 is biased upwards, so below half of the true one before is below half of the empirical one before."""
    made = last(method, side(law))
    x, straight = biased(law("fresh"))(0, 2000)[0], law("fresh")(0, 2000)[0]
    bound = (straight - x).square().sum(1).mean().item()
    y = made(x)
    assert w2_squared_exact(y, law("reference")(1, 2000)[0]) < bound / 2
    assert (y - x).square().sum(1).mean() < 2 * bound
    assert made.reached.distance < made.rounds[0].distance / 2 and made.reached.displacement < 2 * bound


def test_nothing_moves_that_is_right_already():
    law = noise("same")
    heldout = HeldOut(law(5, 400)[0], None, law(6, 400)[0], law(7, 400)[0], w2_squared_exact)
    made = last(Sinkhorn(tolerance=3), Side(law, law, heldout, SEED))
    assert made.steps == () and made.rounds[0].displacement == 0 and len(made.rounds) == 1
    assert torch.equal(made(heldout.x), heldout.x)


@METHODS
def test_a_small_lam_moves_little(method):
    problem = side(noise)
    x = problem.heldout.x
    made = next(iter(fit(method, problem)))
    steps = Step(1e-4, method.potential(problem, 0, problem.source, None))
    assert torch.equal(made(x), x)
    assert (prox(x, None, [steps]) - x).abs().max() < 1e-3


@METHODS
def test_classes_are_projected_by_themselves(method):
    """Every class is moved onto its own moon, though the other is nearer to some of its points."""
    problem = side(moons, labelled=True)
    made = last(method, problem)
    x, label = biased(moons("fresh", labelled=True))(0, 1000)
    target, of = moons("reference", labelled=True)(1, 1000)
    for moon in (0, 1):
        num = min((label == moon).sum(), (of == moon).sum())
        ours, theirs, before = made(x, label)[label == moon][:num], target[of == moon][:num], x[label == moon][:num]
        assert w2_squared_exact(ours, theirs) < w2_squared_exact(before, theirs) / 2


@METHODS
def test_a_map_is_deterministic_and_goes_on_where_it_was_left(method):
    problem, x = side(noise, num=100), noise("fresh")(0, 50)[0]
    method = replace(method, num_steps=1, tolerance=1e-9)
    whole = list(fit(method, problem))
    again = method.load({k: v.clone() for k, v in whole[1].state().items()}, whole[1].rounds)
    assert torch.equal(again(x), whole[1](x)) and again.reached == whole[1].reached
    rest = list(fit(method, problem, again))
    assert [made.rounds for made in rest] == [made.rounds for made in whole[2:]]
    assert torch.equal(rest[-1](x), whole[-1](x)) and not torch.equal(rest[-1](x), again(x))


def test_a_labelled_map_comes_back_from_its_state():
    problem = side(moons, labelled=True, num=100)
    x, label = problem.heldout.x, problem.heldout.label
    for method in (SINKHORN, CRITIC):
        step = Step(1.0, method.potential(problem, 0, problem.source, None))
        made = Projection((step,), ())
        assert torch.equal(method.load(made.state(), ())(x, label), made(x, label))


def test_a_round_that_does_not_help_is_recorded_and_undone():
    """A distance that grows with every step: the target is where the samples are not."""
    problem = side(noise, distance=lambda y, target: 1 + (y - problem.heldout.x).abs().mean().item(), num=50)
    made = last(replace(SINKHORN, tolerance=1e-9), problem)
    assert made.steps == () and [r.kept for r in made.rounds] == [True, False] and made.reached.lam_proj == 0


def test_the_ladder_of_lam():
    method = Sinkhorn(lam_start=1, lam_factor=3, lam_max=10, tolerance=2)
    assert [method.lam(k) for k in (1, 2, 3, 4)] == [1, 3, 9, 10]
    rounds = [Round(0, 8.0, 0, 1.0), Round(1, 5.0, 0.1, 1.0), Round(3, 2.0, 0.2, 1.0)]
    assert [method.is_over(rounds[:k]) for k in range(4)] == [False, False, False, True]
    assert method.is_over([Round(10, 8.0, 0.1, 1.0)]) and method.is_over([*rounds[:2], Round(3, 6.0, 0.1, 1.0, kept=False)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sinkhorn(blur=0), r"projection\.blur=0"),
        (lambda: Sinkhorn(num_iterations=0.5), r"projection\.num_iterations=0\.5"),
        (lambda: Sinkhorn(lam_factor=1), r"projection\.lam_factor=1: must be above 1"),
        (lambda: CriticMethod(lam_start=2, lam_max=1), r"projection\.lam_max=1"),
        (lambda: CriticMethod(batch_size=3000), r"projection\.batch_size=3000: must lie in \[2, pool_size\]"),
    ],
)
def test_bad_settings_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


# Distances


def test_the_exact_distance_is_that_of_the_best_permutation():
    x = noise("x")(0, 300)[0]
    assert w2_squared_exact(x, (x + 0.01)[torch.randperm(300)]) == pytest.approx(2e-4, rel=1e-3)
    spread = torch.eye(2).double()
    expected = gaussian.w2_squared(SHIFT.double(), STRETCH.diag().double() ** 2, torch.zeros(2).double(), spread)
    assert w2_squared_exact(biased(noise("a"))(0, 1500)[0], noise("b")(0, 1500)[0]) == pytest.approx(expected.item(), rel=0.15)


def test_directions_are_unit_vectors_and_coordinates():
    found = directions(40, 64)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(64))
    assert (found[32:].count_nonzero(1) == 1).all() and (found[:32].count_nonzero(1) == 40).all()
    assert len(torch.unique(found[32:].argmax(1))) == 32
    assert torch.equal(found, directions(40, 64))


def test_the_sliced_distance_is_per_dimension_and_sees_what_dense_directions_do_not():
    z = normal(SEED, "sliced", np.arange(2000), (1, 8, 8))
    floor = sliced_w2_squared(z)
    assert floor < 0.005
    assert sliced_w2_squared(z + 0.5) == pytest.approx(0.25, rel=0.25)
    assert sliced_w2_squared(0.7 * z) == pytest.approx(0.09, abs=0.01)
    assert sliced_w2_squared(z + 0.5, z) == pytest.approx(sliced_w2_squared(z + 0.5), rel=0.05)
    heavy = z * (1 + 2 * (torch.rand(z.shape) < 0.1)) / math.sqrt(1.8)
    assert sliced_w2_squared(heavy) > 3 * floor
