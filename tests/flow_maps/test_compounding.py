"""The theorem's table, from the recursion and from samples."""

from itertools import pairwise

import pytest
import torch

from reflow_lab.flow_maps.compounding import consistency_w2, flow_map_w2, uniform_times
from reflow_lab.gaussian import Gaussian

STEPS = (1, 2, 3, 4, 8, 16, 64, 256)
CONSISTENCY = (0.02500, 0.02296, 0.02586, 0.02850, 0.03736, 0.05131, 0.10724, 0.25590)
FLOW_MAP = (0.02500, 0.02531, 0.02542, 0.02547, 0.02555, 0.02559, 0.02563, 0.02563)


def eta(t, s):
    return 0.05 * t**0.5


def delta(t, s):
    return 0.05 * (t - s)


@pytest.mark.parametrize(("num_steps", "expected"), list(zip(STEPS, CONSISTENCY, strict=True)))
def test_consistency_models_compound_their_errors(num_steps, expected):
    assert consistency_w2(0.5, num_steps, eta) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("num_steps", "expected"), list(zip(STEPS, FLOW_MAP, strict=True)))
def test_flow_maps_do_not(num_steps, expected):
    assert flow_map_w2(0.5, num_steps, delta) == pytest.approx(expected, abs=1e-5)


def test_without_an_error_both_are_exact():
    for num_steps in (1, 5, 40):
        assert consistency_w2(0.5, num_steps, lambda *_: 0.0) < 1e-12 > flow_map_w2(0.5, num_steps, lambda *_: 0.0)


@pytest.mark.parametrize("num_steps", [1, 4, 16])
def test_samples_agree(num_steps):
    data, g = Gaussian(0.0, 0.5), torch.Generator().manual_seed(0)
    n, times = 1_000_000, uniform_times(num_steps)
    z = torch.randn(n, generator=g, dtype=torch.float64)
    x, y, zero = z, z, torch.zeros((), dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(times)):
        at, to = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
        x = (1 - t) * x + t * torch.randn(n, generator=g, dtype=torch.float64) if i else x
        x = data.flow_map(x, at, zero) * (1 + eta(t, 0))
        y = data.flow_map(y, at, to) * (1 + delta(t, s))
    error = 5 * 0.5 / (2 * n) ** 0.5  # five standard errors of a standard deviation
    assert abs(float(x.std()) - 0.5) == pytest.approx(consistency_w2(0.5, num_steps, eta), abs=error)
    assert abs(float(y.std()) - 0.5) == pytest.approx(flow_map_w2(0.5, num_steps, delta), abs=error)
