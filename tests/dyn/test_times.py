import numpy as np
import pytest
import torch

from reflow_lab import noise
from reflow_lab.dyn.times import Cosh, Exponential, LogitNormal, Points, TimeLaw, Uniform
from reflow_lab.errors import UserError

SMOOTH = [Uniform(), Cosh(), Cosh(8.0), LogitNormal(), LogitNormal(0.0, 1.0), Exponential(), Exponential(0.1)]
DENSITIES = [  # unnormalised, in the form the papers give
    (Uniform(), lambda t: torch.ones_like(t)),
    (Cosh(4.0), lambda t: torch.cosh(4 * (t - 0.5))),
    (Exponential(10.0), lambda t: 10**t),
    (LogitNormal(-1.2, 1.2), lambda t: torch.exp(-(((t / (1 - t)).log() + 1.2) ** 2) / (2 * 1.2**2)) / (t * (1 - t))),
]


@pytest.mark.parametrize("law", SMOOTH, ids=str)
def test_quantile_inverts_cdf(law: TimeLaw) -> None:
    u = torch.linspace(1e-4, 1 - 1e-4, 999, dtype=torch.float64)
    t = law.quantile(u)
    assert t.dtype == torch.float64 and t.min() > 0 and t.max() < 1
    torch.testing.assert_close(law.cdf(t), u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("law", SMOOTH, ids=str)
def test_times_of_philox_uniforms_follow_the_cdf(law: TimeLaw) -> None:
    num = 4096
    t = law.quantile(noise.uniform(0, "time", np.arange(num))[:, 0]).sort().values
    distance = (law.cdf(t) - (torch.arange(num) + 0.5) / num).abs().max()
    assert distance < 1.36 / num**0.5  # Kolmogorov at 5 %


@pytest.mark.parametrize(("law", "density"), DENSITIES, ids=[str(law) for law, _ in DENSITIES])
def test_cdf_is_the_integral_of_the_stated_density(law: TimeLaw, density) -> None:
    edges = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    cells = density((edges[1:] + edges[:-1]) / 2)
    inner = edges[1:-1]
    torch.testing.assert_close(law.cdf(inner), (cells.cumsum(0) / cells.sum())[:-1], rtol=0, atol=1e-8)


def test_exponential_is_the_papers_formula() -> None:
    u = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Exponential().quantile(u), torch.log10(1 + 9 * u))


def test_logit_normal_is_edms_noise_level() -> None:
    normal = noise.normal(0, "sigma", np.arange(100), (1,)).double()[:, 0]
    sigma = (-1.2 + 1.2 * normal).exp()
    torch.testing.assert_close(LogitNormal().quantile(torch.special.ndtr(normal)), sigma / (1 + sigma))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_points_have_equal_weight(k: int) -> None:
    num = 1000 * k
    t = Points(k).quantile((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    values, counts = t.unique(return_counts=True)
    points = torch.arange(1, k + 1, dtype=torch.float64) / k
    torch.testing.assert_close(values, points)
    assert (counts == 1000).all()
    torch.testing.assert_close(Points(k).cdf(points), points)
    torch.testing.assert_close(Points(k).cdf(points - 1e-6), points - 1 / k)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Cosh(0.0), "dyn.time.a=0.0"),
        (lambda: LogitNormal(std=-1.0), "dyn.time.std=-1.0"),
        (lambda: Exponential(1.0), "dyn.time.base=1.0"),
        (lambda: Points(0), "dyn.time.k=0"),
    ],
)
def test_bad_parameters_are_named(make, key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()
