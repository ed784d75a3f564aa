import numpy as np
import pytest
import scipy.linalg
import torch

from reflow_lab.evaluation.frechet import Moments, Reference
from reflow_lab.gaussian import w2_squared


def two_sets(num: int = 400, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping sets of correlated features, float32, with unequal scales and an offset."""
    random = torch.Generator().manual_seed(3)
    mix = torch.randn(dim, dim, generator=random) * torch.logspace(0, -2, dim)
    a = torch.randn(num, dim, generator=random) @ mix + 3
    b = 0.8 * a + 0.4 * torch.randn(num, dim, generator=random) @ mix.mT + 0.7
    return a, b


def oracle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The textbook formula by scipy's matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return Reference.of(a).distance(b)


def test_distance_is_scipys_and_the_rulers() -> None:
    a, b = two_sets()
    found = frechet_distance(a, b)
    assert found == pytest.approx(oracle(a, b), rel=1e-6)
    moments_a, moments_b = Moments.of(a), Moments.of(b)
    assert found == pytest.approx(float(w2_squared(moments_a.mean, moments_a.cov, moments_b.mean, moments_b.cov)), rel=1e-9)
    assert found == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_distance_with_fewer_samples_than_dimensions() -> None:
    """The cross term is the nuclear norm of the centred sets' product, which needs no d x d matrix."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 60, generator=random).double(), torch.randn(30, 60, generator=random).double() + 1
    xa, xb = (a - a.mean(0)) / 19**0.5, (b - b.mean(0)) / 29**0.5
    cross = torch.linalg.svdvals(xa @ xb.mT).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + xa.square().sum() + xb.square().sum() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert Reference.of(a).linearise(b, own=None).distance == pytest.approx(float(expected), rel=1e-6)


def test_moments_are_those_of_all_chunks_together() -> None:
    a = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) + 10
    whole, merged = Moments.of(a), Moments.of(a[:700]) + Moments.of(a[700:701]) + Moments.of(a[701:])
    np.testing.assert_allclose(whole.cov, np.cov(a.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.cov, merged.cov, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.mean, a.double().mean(0))
    assert merged.num == 3000 and whole.cov.dtype == torch.float64


@pytest.mark.parametrize("paired", [False, True])
def test_influence_is_the_derivative_by_a_samples_weight(paired: bool) -> None:
    """Sample i in place of sample j moves the distance by (influence_i - influence_j) / n, up to O(1/n)."""
    num = 4000
    a, b = two_sets(num, dim=6)
    found = Reference.of(a).linearise(b, own=a if paired else None)
    assert found.distance == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert abs(float(found.influence.mean())) < 1e-9
    expected, moved = [], []
    for i, j in [(0, 1), (2, 3), (4, 5), (100, 200), (300, 17)]:
        swapped = torch.arange(num)
        swapped[j] = i
        moved.append(frechet_distance(a[swapped] if paired else a, b[swapped]) - found.distance)
        expected.append(float(found.influence[i] - found.influence[j]) / num)
    np.testing.assert_allclose(moved, expected, atol=0.02 * np.abs(expected).max())


def test_errors_are_clear() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        frechet_distance(torch.randn(5, 3), torch.randn(5, 4))
