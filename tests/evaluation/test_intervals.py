import math

import pytest
import torch

from reflow_lab.evaluation.frechet import Moments, Reference
from reflow_lab.evaluation.intervals import (
    bootstrap,
    difference,
    interval,
    linear_bootstrap,
    mean_bootstrap,
    mean_interval,
    resample_indices,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def standard_reference(dim: int) -> Reference:
    """The exact moments of N(0, 1)."""
    num = 10**6
    return Reference.of(Moments(num, torch.zeros(dim).double(), (num - 1) * torch.eye(dim).double()))


def test_resamples_depend_on_seed_and_index_only() -> None:
    few, many = resample_indices(50, 3, seed=1), resample_indices(50, 10, seed=1)
    assert torch.equal(few, many[:3]) and not torch.equal(few, resample_indices(50, 3, seed=2))
    counts = torch.bincount(resample_indices(50, 2000, seed=0).flatten(), minlength=50)
    assert counts.shape == (50,) and (counts - 2000).abs().max() < 5 * 2000**0.5


def test_a_mean_needs_no_linearisation() -> None:
    values = normal(200).exp()
    exact = bootstrap(lambda indices: float(values[indices].mean()), 200, 40, seed=5)
    torch.testing.assert_close(mean_bootstrap(values, 40, seed=5), exact)


def test_a_means_error_is_sigma_over_root_n() -> None:
    values = normal(1000)
    found = interval(float(values.mean()), mean_bootstrap(values, 2000, seed=0))
    assert found.std == pytest.approx(float(values.std()) / 1000**0.5, rel=0.06)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * found.std, found.value + 1.96 * found.std), rel=1e-4)


def test_frechet_interval_covers_the_truth() -> None:
    """Data N(0, 1), samples N(m, s^2) in d dimensions: FD = d (m^2 + (s-1)^2), var = d s^2 (4 m^2 + 2 (s-1)^2) / n."""
    dim, num, m, s = 3, 500, 0.5, 1.6
    truth = dim * (m**2 + (s - 1) ** 2)
    sd = (dim * s**2 * (4 * m**2 + 2 * (s - 1) ** 2) / num) ** 0.5
    reference, intervals = standard_reference(dim), []
    for seed in range(300):
        found = reference.linearise(m + s * normal(num, dim, seed=seed))
        intervals.append(interval(found.distance, linear_bootstrap(*found, 200, seed=0)))
    covered = sum(i.low < truth < i.high for i in intervals) / 300
    spread = torch.tensor([i.value for i in intervals]).std()
    assert 0.91 < covered < 0.985
    assert sum(i.std for i in intervals) / 300 == pytest.approx(sd, rel=0.05)
    assert float(spread) == pytest.approx(sd, rel=0.12)


@pytest.mark.parametrize("paired", [False, True])
def test_linear_bootstrap_of_a_frechet_distance_is_the_plain_one(paired: bool) -> None:
    num = 1500
    teacher = normal(num, 4)
    student = 0.3 + teacher @ (0.4 * normal(4, 4, seed=1) + torch.eye(4)) + 0.2 * normal(num, 4, seed=2)
    found = Reference.of(teacher).linearise(student, own=teacher if paired else None)
    fast = linear_bootstrap(*found, 100, seed=3)
    slow = bootstrap(lambda i: Reference.of(teacher[i] if paired else teacher).distance(student[i]), num, 100, seed=3)
    assert float(torch.corrcoef(torch.stack((fast, slow)))[0, 1]) > 0.99
    assert float(fast.std()) == pytest.approx(float(slow.std()), rel=0.05)
    assert float(fast.mean()) == pytest.approx(found.distance, abs=0.3 * float(fast.std()))


def test_an_effect_of_two_rows_is_sharper_than_either() -> None:
    """What the rows share through the noise cancels; the truth is the spread over fresh noise."""
    reference, num = standard_reference(3), 400

    def rows(seed: int) -> list:
        shared, own = normal(num, 3, seed=seed), normal(num, 3, seed=10_000 + seed)
        return [reference.linearise(x) for x in (0.5 + 1.5 * shared, 0.45 + 1.45 * shared + 0.1 * own)]

    (a, b), resampled = rows(0), [linear_bootstrap(*row, 400, seed=0) for row in rows(0)]
    effect = difference(a.distance, resampled[0], b.distance, resampled[1])
    truth = torch.tensor([a.distance - b.distance for a, b in map(rows, range(1, 200))]).std()
    assert effect.value == pytest.approx(a.distance - b.distance)
    assert effect.std == pytest.approx(float(truth), rel=0.25)
    assert effect.std < 0.3 * min(float(r.std()) for r in resampled)


def test_seeds_get_a_t_interval() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.std == pytest.approx(3**-0.5)
    assert found.high - found.value == pytest.approx(4.302653 * 3**-0.5, rel=1e-6)
    assert math.isnan(mean_interval([1.0]).low) and mean_interval([1.0]).value == 1
