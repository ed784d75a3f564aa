"""The theorem's table, from the recursion and from the sampler, and its files."""

import math

import pytest
from matplotlib.figure import Figure

from reflow_lab.artifacts import read_json
from reflow_lab.flow_maps import compounding
from reflow_lab.flow_maps.compounding import (
    DIM,
    ROWS,
    consistency_w2,
    delta,
    draw_trained,
    eta,
    flow_map_w2,
    growth,
    measured_w2,
    trained_markdown,
)
from reflow_lab.studies import results

STEPS = (1, 2, 3, 4, 8, 16, 64, 256)
CONSISTENCY = (0.02500, 0.02296, 0.02586, 0.02850, 0.03736, 0.05131, 0.10724, 0.25590)
FLOW_MAP = (0.02500, 0.02531, 0.02542, 0.02547, 0.02555, 0.02559, 0.02563, 0.02563)


@pytest.mark.parametrize(("num_steps", "expected"), list(zip(STEPS, CONSISTENCY, strict=True)))
def test_consistency_models_compound_their_errors(num_steps, expected):
    assert consistency_w2(0.5, num_steps, eta) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("num_steps", "expected"), list(zip(STEPS, FLOW_MAP, strict=True)))
def test_flow_maps_do_not(num_steps, expected):
    assert flow_map_w2(0.5, num_steps, delta) == pytest.approx(expected, abs=1e-5)


def test_without_an_error_both_are_exact():
    for num_steps in (1, 5, 40):
        assert consistency_w2(0.5, num_steps, lambda *_: 0.0) < 1e-12 > flow_map_w2(0.5, num_steps, lambda *_: 0.0)


def require_sampled(num_steps, rows=ROWS, dim=DIM):
    """Both models, sent through the sampler, within four standard errors; which are those of W2 = |std - c|."""
    for gamma, error, expected in (
        (1.0, eta, consistency_w2(0.5, num_steps, eta)),
        (0.0, delta, flow_map_w2(0.5, num_steps, delta)),
    ):
        found = measured_w2(0.5, num_steps, error, gamma, rows, dim)
        assert found.error == pytest.approx((0.5 + expected) / (2 * rows * dim) ** 0.5, rel=0.03)
        assert found.value == pytest.approx(expected, abs=4 * found.error)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 16])
def test_a_million_samples_agree(num_steps):
    require_sampled(num_steps)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [64, 256])
def test_a_million_samples_agree_over_many_steps(num_steps):
    require_sampled(num_steps)


def test_samples_of_one_coordinate_agree():
    require_sampled(8, rows=20_000, dim=1)


def test_fewer_samples_agree_over_many_steps():
    require_sampled(256, rows=100, dim=200)


def trained(tmp_path, seeds):
    """The result of a study of one row."""
    cells = [
        {"name": "flow map", "protocol": {"nfe": nfe}, "seed": seed, "fd_points": 0.01 * (1 + seed) / nfe, "floor": 1e-4}
        for nfe in (1, 4)
        for seed in seeds
    ]
    cells = [{**cell, "num_images": 100} for cell in cells]
    rows = [{"name": "flow map"}]
    results.write(tmp_path, {"distance": "fd_points", "nfe": [1, 4], "seeds": seeds, "rows": rows, "cells": cells})


@pytest.mark.parametrize("seeds", [None, [0], [0, 1, 2]])
def test_the_table_and_its_picture(tmp_path, monkeypatch, seeds):
    monkeypatch.setattr(compounding, "STEPS", (1, 4))
    monkeypatch.setattr(compounding, "ROWS", 10)
    if seeds:
        trained(tmp_path, seeds)
    compounding.main([str(tmp_path)])
    written = read_json(tmp_path / "theorem.json")
    assert written["samples"] == 10_000 and [row["steps"] for row in written["rows"]] == [1, 4]
    assert written["rows"][1]["consistency"]["recursion"] == consistency_w2(0.5, 4, eta)
    text = (tmp_path / "theorem.md").read_text()
    assert "| 4 | 0.02850 |" in text and "| 0.02547 |" in text
    width = int.from_bytes((tmp_path / "over_k.png").read_bytes()[16:20])
    assert width == (1560 if seeds else 780)  # two panels or one


def test_trained_models_are_shown_by_the_root_of_their_distance(monkeypatch):
    """Geometric mean and interval over seeds of W2, of values that differ by factors."""
    axes, shown = Figure().subplots(), {}
    monkeypatch.setattr(axes, "errorbar", lambda x, y, errors, **_: shown.update(x=x, y=y, errors=errors))
    cells = [
        {"name": "a", "protocol": {"nfe": 1}, "seed": s, "d": v, "floor": 1e-4, "num_images": 9} for s, v in ((0, 1.0), (1, 16.0))
    ]
    draw_trained(axes, {"distance": "d", "nfe": [1], "seeds": [0, 1], "rows": [{"name": "a"}], "cells": cells})
    assert (shown["x"], shown["y"]) == ([1], [2.0])
    factor = math.exp(12.7062 * math.log(2))  # t(0.975, 1) of a standard error of ln 2
    assert shown["errors"] == [pytest.approx([2 - 2 / factor]), pytest.approx([2 * factor - 2], rel=1e-4)]


def test_growth_is_measured_within_each_seed():
    """Factors of 2 and 8 whatever the seeds' own levels: 4, with the t interval of the logarithms."""
    levels = {(0, 2): 1.0, (0, 8): 4.0, (1, 2): 100.0, (1, 8): 6400.0}  # of W2 squared
    cells = [
        {"name": "a", "protocol": {"nfe": nfe}, "seed": s, "d": v, "floor": 0.01, "num_images": 9}
        for (s, nfe), v in levels.items()
    ]
    study = {"distance": "d", "nfe": [1, 2, 8], "seeds": [1, 0], "rows": [{"name": "a"}], "cells": cells}
    found, half = growth(study, "a", 2, 8), 12.7062 * math.log(2)
    assert (found.value, found.low, found.high) == pytest.approx((4, 4 / math.exp(half), 4 * math.exp(half)), rel=1e-4)
    text = trained_markdown({**study, "nfe": [2, 8]})
    assert "| K | 2 | 8 | from 2 to 8 |" in text and "| × 4.00 (" in text and "Real points are 0.1000 away" in text
