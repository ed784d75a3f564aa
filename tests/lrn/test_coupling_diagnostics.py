"""Diagnostics of a coupling against closed forms and direct counts."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kurtosis, skew

from reflow_lab.errors import UserError
from reflow_lab.evaluation.paired import radial_bands
from reflow_lab.flow import interpolate
from reflow_lab.gaussian import Gaussian, w2_squared
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import Heun
from reflow_lab.lrn import diagnostics
from reflow_lab.lrn.diagnostics import (
    NearestVelocity,
    crossing_share,
    diagnose,
    index_pairs,
    log_minimiser,
    midpoints,
    moments,
    neighbour_straightness,
    own_loss_shift,
    rectification_bias,
    reversed_share,
    spectrum,
    straightness,
    table,
)

STD = 0.5
LAW = Gaussian(0.3, STD)
TIMES = midpoints(8)


def independent(num, dim, dtype=torch.float32):
    """Independent pairs whose data have the law LAW."""
    noise, x1 = torch.randn(2, num, dim, dtype=dtype)
    return 0.3 + STD * noise, x1


def affine(num, dim):
    """Pairs x0 = 0.3 + x1 / 2."""
    x1 = torch.randn(num, dim)
    return 0.3 + STD * x1, x1


# Straightness


def test_straightness_of_an_independent_gaussian_coupling():
    """E ||x1 - x0 - v||^2 = std^2 / S(t)^2 a dimension, by regression of a normal on another; the integral is std pi / 2."""
    x0, x1 = independent(40_000, 2)
    found = straightness(LAW, x0, x1, TIMES)
    torch.testing.assert_close(found, (STD / LAW.spread(TIMES)) ** 2, rtol=0.02, atol=0)
    assert found.mean().item() == pytest.approx(STD * math.pi / 2, rel=0.01)


def test_another_velocity_adds_its_own_error():
    x0, x1 = independent(40_000, 2)
    least = straightness(LAW, x0, x1, TIMES)
    more = straightness(lambda x, t, label: LAW(x, t) + 0.4, x0, x1, TIMES)
    torch.testing.assert_close(more, least + 0.16, rtol=0, atol=0.02)


def test_lines_that_do_not_meet_are_straight():
    """Of x0 = 0.3 + x1 / 2 the noise is (x_t - 0.3 (1-t)) / S with S = t + (1-t) / 2, and the velocity x1 / 2 - 0.3."""
    x0, x1 = affine(4000, 2)

    def velocity(x, t, label=None):
        t = t[:, None]
        return (1 - STD) * (x - 0.3 * (1 - t)) / (t + STD * (1 - t)) - 0.3

    assert straightness(velocity, x0, x1, TIMES).max() < 1e-11
    assert neighbour_straightness(x0, x1, TIMES).max() < 1e-3 < 0.2 < neighbour_straightness(*independent(4000, 2), TIMES).min()


def test_a_velocity_sees_its_batch_with_its_labels():
    x0, x1 = independent(100, 2)
    label, sizes = torch.arange(100), []

    def velocity(x, t, label):
        sizes.append(len(x))
        torch.testing.assert_close(x, interpolate(x0[label], x1[label], t))
        return x

    whole = straightness(velocity, x0, x1, TIMES[:2], label)
    torch.testing.assert_close(straightness(velocity, x0, x1, TIMES[:2], label, batch_size=64), whole)
    assert sizes == [100, 100, 64, 36, 64, 36]


@pytest.mark.parametrize("num_neighbours", [1, 2, 16])
def test_neighbours_estimate_it_without_a_velocity(num_neighbours):
    """Whatever their number: without the factor k / (k+1) the value would be 2, 1.5 and 1.06 times as high."""
    found = neighbour_straightness(*independent(5000, 2), TIMES, num_neighbours=num_neighbours)
    torch.testing.assert_close(found, (STD / LAW.spread(TIMES)) ** 2, rtol=0.06, atol=0)
    assert found.mean().item() == pytest.approx(STD * math.pi / 2, rel=0.03)


# The nearest pairs as a velocity


def by_hand(x0, x1, x_t, t, num_neighbours, leave_one_out=False):
    """Mean of x1 - x0 over the nearest, from all distances; t one for each row."""
    distance = (interpolate(x0[None], x1[None], t[:, None]) - x_t[:, None]).square().sum(2)
    if leave_one_out:
        distance.fill_diagonal_(math.inf)
    return (x1 - x0)[distance.argsort(dim=1)[:, :num_neighbours]].mean(1)


def interpolants(x0, x1):
    """A time for each pair, one of three, and the pairs' points there."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[torch.arange(len(x0)) % 3]
    return interpolate(x0, x1, t), t


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_nearest_are_those_of_all_distances(dim, leave_one_out, monkeypatch):
    monkeypatch.setattr(diagnostics, "CHUNK", 50)
    x0, x1 = independent(60, dim, torch.float64)
    x_t, t = interpolants(x0, x1)
    found = NearestVelocity(x0, x1, 4, leave_one_out=leave_one_out)(x_t, t)
    torch.testing.assert_close(found, by_hand(x0, x1, x_t, t, 4, leave_one_out))


def test_a_single_time_and_one_neighbour_return_the_pair_itself():
    x0, x1 = independent(50, 2)
    t = torch.tensor(0.3)
    assert torch.equal(NearestVelocity(x0, x1, 1)(interpolate(x0, x1, t), t), x1 - x0)


def test_a_pair_is_left_out_among_its_doubles():
    """Five equal data points at t = 0: a pair's two neighbours are two of the other four, never the pair itself."""
    x0, x1 = torch.zeros(5, 1), 2.0 ** torch.arange(5)[:, None]
    found = NearestVelocity(x0, x1, 2, leave_one_out=True)
    near = found.neighbours(x0, torch.tensor(0.0), None, torch.arange(5))
    assert all(row not in near[row] and len(set(near[row].tolist())) == 2 for row in range(5))


def test_classes_are_kept_apart():
    """Two classes a shift of 1 up and down: known, the lines of a class are parallel; unknown, they meet."""
    x1, label = torch.randn(2000, 1), torch.arange(2000) % 2
    x0 = x1 + (2 * label[:, None] - 1)
    assert neighbour_straightness(x0, x1, TIMES, label).max() < 1e-10
    assert neighbour_straightness(x0, x1, TIMES).max() > 0.5
    velocity = NearestVelocity(x0, x1, 8, label)
    x, wanted, t = torch.linspace(-9, 9, 30)[:, None], torch.arange(30) // 3 % 2, torch.arange(30) // 10 / 3
    torch.testing.assert_close(velocity(x, t, label=wanted), 1.0 - 2 * wanted[:, None])


def test_its_flow_carries_noise_to_data():
    x0, x1 = independent(4000, 2)
    made = sample(NearestVelocity(x0, x1, 32), x1[:1000], solver=Heun(), grid=Uniform(), nfe=19, t_max=1.0)
    torch.testing.assert_close(made.std(0), torch.full((2,), STD), rtol=0.08, atol=0)
    torch.testing.assert_close(made.mean(0), torch.full((2,), 0.3), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "num_neighbours", "label", "message"),
    [
        ((9, 17), 2, None, r"shape=\(17,\)"),
        ((9, 1, 4, 4), 2, None, r"shape=\(1, 4, 4\)"),
        ((9, 2), 9, None, r"num_neighbours=9: must lie in \[1, 8\]"),
        ((9, 2), 0, None, "num_neighbours=0"),
        ((9, 2), 2, torch.tensor([0] * 7 + [1] * 2), "the smallest class has 2 pairs"),
    ],
)
def test_neighbours_that_cannot_be_had(shape, num_neighbours, label, message):
    with pytest.raises(UserError, match=message):
        NearestVelocity(torch.randn(shape), torch.randn(shape), num_neighbours, label, leave_one_out=True)


# How far from white noise


def test_moments_come_in_chunks():
    x = torch.rand(1000, 3, dtype=torch.float64) ** 2 - 0.2
    found, flat, energy = moments(torch.split(x, 37)), x.flatten().numpy(), x.square().mean(1)
    expected = {"mean": flat.mean(), "std": flat.std(), "skewness": skew(flat), "kurtosis": kurtosis(flat, fisher=False)}
    expected |= {"min": flat.min(), "max": flat.max(), "energy_mean": energy.mean(), "energy_std": energy.std(correction=0)}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)


def test_moments_of_white_noise_and_of_constants():
    found = moments([torch.randn(2000, 48), torch.randn(2000, 48)])
    expected = {"mean": 0, "std": 1, "skewness": 0, "kurtosis": 3, "energy_mean": 1, "energy_std": (2 / 48) ** 0.5}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.04)
    still = moments([torch.ones(4, 2)])
    assert (still["std"], still["skewness"], still["kurtosis"]) == (0, 0, 0)


def test_spectrum_of_white_and_of_smoothed_noise():
    """(n_i + n_(i+1)) / sqrt(2) along a row has power 1 + cos(2 pi f) at its frequency f, and neighbours correlate by 1/2."""
    noise = torch.randn(2000, 2, 16, 16)
    white, smooth = spectrum(noise), spectrum((noise + noise.roll(1, 3)) / 2**0.5)
    assert white == pytest.approx({k: float(k.startswith("power")) for k in white}, abs=0.03) and len(white) == 5
    gain = (1 + (2 * torch.pi * torch.fft.fftfreq(16)).cos()).expand(16, 16)
    for band, name in enumerate(("low", "mid", "high")):
        assert smooth[f"power_{name}"] == pytest.approx(gain[radial_bands(16, 16) == band].mean().item(), rel=0.03)
    assert smooth["correlation_right"] == pytest.approx(0.5, abs=0.01)
    assert smooth["correlation_down"] == pytest.approx(0, abs=0.01)


def test_spectrum_of_odd_images(monkeypatch):
    """A band without a frequency is left out; constants have no correlation; chunks add up."""
    assert spectrum(torch.ones(3, 1, 4, 4)) == {"power_low": 16, "power_high": 0, "correlation_right": 0, "correlation_down": 0}
    x = torch.randn(30, 1, 6, 8)
    whole = spectrum(x)
    monkeypatch.setattr(diagnostics, "CHUNK", 100)
    assert spectrum(x) == pytest.approx(whole)


# Crossing


def optimal(x0, x1):
    """The same points in the optimal order for the squared distance."""
    return x0[linear_sum_assignment(torch.cdist(x1, x0).square().numpy())[1]], x1


def test_reversed_pairs_on_a_line_are_those_that_meet():
    """Two lines meet where x0_i - x0_j + t (difference of their velocities) = 0."""
    x0, x1 = independent(80, 1, torch.float64)
    i, j = np.triu_indices(80, 1)
    gap0, gap1 = (x0[i] - x0[j])[:, 0], (x1[i] - x1[j])[:, 0]
    t = gap0 / (gap0 - gap1)
    assert reversed_share(x0, x1) == ((t > 0) & (t < 1)).double().mean().item()


@pytest.mark.parametrize("dim", [1, 2, 12])
def test_an_optimal_coupling_has_no_reversed_pair_and_an_independent_one_half(dim):
    x0, x1 = independent(300, dim, torch.float64)
    assert reversed_share(*optimal(x0, x1)) == 0
    assert reversed_share(*independent(1500, dim)) == pytest.approx(0.5, abs=0.03)
    assert reversed_share(-x1, x1) == 1
    assert reversed_share(torch.ones_like(x1), x1) == 0


def segments(*pairs):
    """x0 and x1 of segments given by their ends."""
    return torch.tensor(pairs, dtype=torch.float32).unbind(1)


@pytest.mark.parametrize(
    ("pair", "crosses"),
    [
        ((((0, 0), (2, 2)), ((0, 2), (2, 0))), True),
        ((((0, 0), (2, 2)), ((0, 1), (2, 3))), False),  # parallel
        ((((0, 0), (2, 2)), ((3, 0), (2.5, 9))), False),  # only the lines cross
        ((((0, 0), (2, 2)), ((3, 4), (1.6, 1.9))), False),  # the other's line is crossed, this one is not
        ((((0, 0), (2, 2)), ((0, 0), (2, 0))), False),  # a common end
        ((((0, 0), (2, 2)), ((1, 1), (2, 0))), False),  # an end on the other
        ((((0, 0), (2, 2)), ((1, 1), (3, 3))), False),  # on one line
    ],
)
def test_crossing_by_hand(pair, crosses):
    assert crossing_share(*segments(*pair)) == crosses
    assert crossing_share(*segments(*pair[::-1])) == crosses


def test_crossing_is_the_solution_of_two_equations():
    x0, x1 = independent(80, 2, torch.float64)
    i, j = np.triu_indices(80, 1)
    along = torch.stack((x0[i] - x1[i], -(x0[j] - x1[j])), dim=2)
    places = torch.linalg.solve(along, x1[j] - x1[i])
    inside = ((places > 0) & (places < 1)).all(1).double().mean().item()
    assert crossing_share(x0, x1) == inside and 0.1 < inside < 0.4


def test_crossing_of_stars():
    x1 = torch.randn(200, 2)
    assert crossing_share(-x1, x1) == 1
    assert crossing_share(x1 / 2, x1) == 0
    with pytest.raises(UserError, match="shape"):
        crossing_share(torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(UserError, match="num=1"):
        crossing_share(torch.zeros(1, 2), torch.zeros(1, 2))


def test_a_sample_of_pairs_stands_for_all():
    x0, x1 = independent(400, 2)
    for measure in (reversed_share, crossing_share):
        some = [measure(x0, x1, num_pairs=20_000, seed=seed) for seed in (0, 0, 1)]
        assert some[0] == some[1] != some[2]
        assert some == pytest.approx([measure(x0, x1)] * 3, abs=0.015)


def test_index_pairs():
    every = torch.cat([torch.stack(part) for part in index_pairs(7, 21, 0, 2**21)], dim=1)
    assert every.T.tolist() == [[i, j] for i in range(7) for j in range(i + 1, 7)]
    i, j = (torch.cat(part) for part in zip(*index_pairs(7, 20, 0, 2**20), strict=True))
    assert len(i) == 20 and (i != j).all()
    i, j = next(index_pairs(300, 40_000, 0, 1))
    assert (i != j).all() and {int(v.min()) for v in (i, j)} == {0} and {int(v.max()) for v in (i, j)} == {299}
    assert i.double().mean().item() == pytest.approx(149.5, abs=2) == j.double().mean().item()


# The weight by the own sample's loss


@pytest.mark.parametrize("eps", [1e-4, 0.05, 0.5])
@pytest.mark.parametrize("num_ones", [3, 7, 9])
def test_log_minimiser_of_two_points(num_ones, eps):
    """Of 0 and 1 with odds (1-p) : p it is a root of (1-p) D ((1-D)^2 + eps) = p (1-D) (D^2 + eps): the one past the mean."""
    p = num_ones / 10
    roots = np.roots([1, p - 2, 1 - p + eps, -p * eps])
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-9)
    samples = torch.cat((torch.ones(num_ones), torch.zeros(10 - num_ones))).double()[None, :, None]
    assert log_minimiser(samples, eps, 500).item() == pytest.approx(real[-1] if p > 0.5 else real[0], abs=1e-8)


def test_log_minimiser_never_climbs():
    samples = torch.randn(50, 12, 3, dtype=torch.float64)
    paths = [log_minimiser(samples, 1e-2, steps) for steps in range(30)]
    values = torch.stack([((samples - D[:, None]).square().mean(2) + 1e-2).log().mean(1) for D in paths])
    torch.testing.assert_close(paths[0], samples.mean(1))
    assert (values.diff(dim=0) < 1e-12).all() and (values[-1] < values[0] - 0.1).any()


def two_points(num):
    """Data -1 or 1, and independent noise, on a line."""
    return (torch.rand(num, 1) < 0.5).float() * 2 - 1, torch.randn(num, 1)


def expected_two_points(t, eps=1e-4):
    """Shift and spread by quadrature over x_t, the chance p of 1 given x_t in closed form."""
    x = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    up, down = ((-((x - end * (1 - t)) ** 2) / (2 * t**2)).exp() for end in (1, -1))
    p, density = up / (up + down), (up + down) / (up + down).sum()
    mean = D = 2 * p - 1
    for _ in range(500):
        above, below = p / ((1 - D) ** 2 + eps), (1 - p) / ((1 + D) ** 2 + eps)
        D = (above - below) / (above + below)
    return [(density * value).nansum().sqrt().item() for value in ((D - mean) ** 2, 4 * p * (1 - p))]


def test_own_loss_of_two_points():
    """The mean between the two is moved to the likelier one."""
    times = torch.tensor([0.4, 0.55, 0.7])
    found = own_loss_shift(*two_points(4000), times, num_neighbours=64)
    shift, spread = zip(*(expected_two_points(t) for t in times.tolist()), strict=True)
    assert found["shift"] == pytest.approx(shift, rel=0.12)
    assert found["spread"] == pytest.approx(spread, rel=0.12)
    assert found["ratio"] == pytest.approx([a / b for a, b in zip(found["shift"], found["spread"], strict=True)])
    assert all(0.5 * shift < common <= shift for common, shift in zip(found["common"], found["shift"], strict=True))


def test_own_loss_does_nothing_where_the_pair_is_determined():
    """Its shift is bounded by the smoothing, which falls with the number of pairs; at k = 4 of equals it is 0."""
    few, many = (own_loss_shift(*affine(num, 2), TIMES[::4], num_neighbours=8) for num in (250, 4000))
    for name, bound in (("shift", 0.02), ("spread", 0.05), ("resolution", 0.1)):
        assert all(late < bound and late < early / 2 for early, late in zip(few[name], many[name], strict=True))
    assert own_loss_shift(torch.ones(9, 2), torch.randn(9, 2), TIMES, 4)["shift"] == [0] * 8


def test_own_loss_of_a_normal_posterior():
    """Symmetric with one peak: no shift but that of the draw; the spread is std t / S(t)."""
    found = own_loss_shift(*independent(4000, 2), TIMES[2::2], num_neighbours=64)
    assert found["spread"] == pytest.approx((STD * TIMES / LAW.spread(TIMES))[2::2].tolist(), rel=0.05)
    assert max(found["ratio"]) < 0.2
    assert all(common < 0.05 * spread for common, spread in zip(found["common"], found["spread"], strict=True))


def test_own_loss_knows_eps_and_classes():
    x0, x1 = two_points(2000)
    t = torch.tensor([0.7])
    near, far = (own_loss_shift(x0, x1, t, 32, eps)["shift"][0] for eps in (1e-4, 10.0))
    assert far < near / 5
    given = own_loss_shift(x0, x1, t, 32, label=(x0[:, 0] > 0).long())
    assert given["spread"] == [0] and given["shift"] == [0] and given["ratio"] == [0]
    with pytest.raises(UserError, match="num_neighbours=3"):
        own_loss_shift(x0, x1, t, 3)


def test_own_loss_looks_at_few_places_and_all_pairs(monkeypatch):
    """Every third x_t, and the same whatever the pieces."""
    x0, x1 = independent(300, 2)
    t = torch.tensor([0.5])
    whole = own_loss_shift(x0, x1, t, 299)
    assert whole["spread"] == pytest.approx([x0.double().var(0).mean().sqrt().item()], rel=0.01)
    monkeypatch.setattr(diagnostics, "MOST_POSTERIORS", 100)
    some = own_loss_shift(x0, x1, t, 4)
    monkeypatch.setattr(diagnostics, "CHUNK", 100)
    assert own_loss_shift(x0, x1, t, 4) == {name: pytest.approx(value) for name, value in some.items()}
    x_t, own = interpolate(x0, x1, t).double(), interpolate(x0[::3], x1[::3], t).double()
    nearest = torch.cdist(own, x_t).square().sort(dim=1)
    assert some["resolution"][0] == pytest.approx((nearest.values[:, :4].mean() / 2).sqrt().item(), rel=1e-4)
    assert some["spread"][0] == pytest.approx(x0[nearest.indices[:, :4]].var(1).mean().sqrt().item(), rel=1e-4)


# The bias of a rectification


def fit_distance(a, b):
    """W2^2 of normal laws fitted to two sets of points."""
    return w2_squared(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def bias(velocity, **more):
    """Of an independent coupling, both of whose marginals are the same points but for scale and place; the target is shifted."""
    x1 = torch.randn(500, 2, dtype=torch.float64)
    x0 = (LAW.mean + STD * x1)[torch.randperm(500)]
    settings = {"solver": Heun(), "grid": Uniform(), "nfe": 199, "t_max": 1.0}
    return x1, rectification_bias(velocity, x0, x1, x0 + 0.1, fit_distance, **settings, **more)


def test_an_exact_velocity_adds_no_bias():
    _, found = bias(LAW)
    assert found["coupling"] == pytest.approx(2 * 0.1**2)
    assert found["bias"] == found["flow"] - found["coupling"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("std", [0.4, 0.7])
def test_a_wrong_velocity_adds_its_error(std):
    """The velocity of data of another spread moves the covariance's part by (std - 0.5)^2 tr cov(x1), and the mean's a little."""
    x1, found = bias(Gaussian(LAW.mean, std))
    covariance = (std - STD) ** 2 * x1.T.cov().trace().item()
    mean = ((0.1 - (std - STD) * x1.mean(0)).square().sum() - found["coupling"]).item()
    assert found["bias"] == pytest.approx(covariance + mean, rel=1e-2) and found["bias"] > 0.01


def test_the_flow_is_sampled_by_batch_with_its_labels():
    seen = []

    def velocity(x, t, s=None, *, label=None, lam_guid=None):
        if t[0] == 1:
            seen.append((x, label))
        return LAW(x, t)

    x1, found = bias(velocity, label=torch.arange(500), batch_size=300)
    assert found["bias"] == pytest.approx(0, abs=1e-4)
    assert [len(x) for x, _ in seen] == [300, 200]
    assert all(torch.equal(x, x1[label]) for x, label in seen)


# All of it


def printed(found):
    """The words of the table, no line of which is too long; what was found is plain JSON."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = table(found)
    assert max(map(len, text.splitlines())) <= 80
    return text.split()


def test_diagnose_points():
    x0, x1 = independent(300, 2)
    found = diagnose(x0, x1, torch.arange(300) % 2, lambda x, t, label: LAW(x, t), num_bins=4, num_neighbours=16)
    assert found["num"] == 300 and found["shape"] == [2] and found["times"] == [0.125, 0.375, 0.625, 0.875]
    assert found["crossing_share"] == crossing_share(x0, x1) and found["reversed_share"] == reversed_share(x0, x1)
    assert found["moments"]["x0"] == pytest.approx(moments([x0]))
    exact = straightness(LAW, x0, x1, midpoints(4))
    assert found["straightness"] == {"by_time": pytest.approx(exact.tolist()), "mean": pytest.approx(exact.mean().item())}
    near = neighbour_straightness(x0, x1, midpoints(4), torch.arange(300) % 2)
    assert found["neighbour_straightness"]["by_time"] == near.tolist()
    assert found["own_loss"] == own_loss_shift(x0, x1, midpoints(4), 16, label=torch.arange(300) % 2)
    words = printed(found)
    for value in (found["crossing_share"], found["own_loss"]["shift"][-1], exact[0].item(), found["moments"]["x1"]["kurtosis"]):
        assert f"{value:.3g}" in words
    assert {"0.875", "by", "k-NN", "resolution", "neighbour_straightness"} <= set(words)


def test_diagnose_images_with_and_without_a_velocity():
    x1 = torch.randn(40, 1, 8, 8)
    found = diagnose(x1 / 2, x1)
    assert set(found) == {"num", "shape", "times", "moments", "reversed_share", "spectrum"} and found["reversed_share"] == 0
    assert found["spectrum"]["x0"]["power_high"] == pytest.approx(found["spectrum"]["x1"]["power_high"] / 4)
    assert {"power_low", "correlation_down"} <= set(printed(found))
    sizes = []

    def velocity(x, t, label):
        sizes.append(len(x))
        return torch.zeros_like(x)

    shown = diagnose(x1 / 2, x1, None, velocity, num_bins=1, batch_size=25)
    assert sizes == [25, 15]
    assert shown["straightness"]["mean"] == pytest.approx((x1 / 2).square().mean().item(), rel=1e-5)
    assert "straight" in printed(shown)


def test_diagnose_draws_pairs_by_its_seed():
    x0, x1 = independent(90, 2)
    found = diagnose(x0, x1, num_pairs=50, seed=3, num_bins=1)
    for name, measure in (("reversed_share", reversed_share), ("crossing_share", crossing_share)):
        assert found[name] == measure(x0, x1, 50, seed=3) != measure(x0, x1, 50) != measure(x0, x1)


def test_diagnose_points_of_many_dimensions():
    found = diagnose(*independent(50, 20))
    assert set(found) == {"num", "shape", "times", "moments", "reversed_share"}
    printed(found)
