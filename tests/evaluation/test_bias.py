import json

import pytest
import torch

from reflow_lab.evaluation import bias
from reflow_lab.evaluation.frechet import Reference

SMALL = bias.problem(4)


def test_the_true_distance_is_what_the_estimator_gives_for_exact_moments() -> None:
    A, B, s = SMALL
    reference, samples = Reference.given(torch.zeros_like(s), A), Reference.given(s, B)
    again = (samples.mean - reference.mean).square().sum() + A.trace() + B.trace()
    again -= 2 * torch.linalg.eigvalsh(reference.root @ B @ reference.root).sqrt().sum()
    assert float(again) == pytest.approx(bias.true_distance(SMALL), rel=1e-9)


@pytest.mark.parametrize("num", [300, 1200])
def test_bias_and_spread_are_what_the_first_order_says(num: int) -> None:
    """Within the error of 60 repeats and a share for the next order, d / N."""
    found = bias.measured(SMALL, num, repeats=60)
    assert found.bias == pytest.approx(bias.predicted_bias(SMALL, num), abs=3 * found.error + 16 / num * found.bias)
    assert found.std == pytest.approx(bias.predicted_std(SMALL, num), rel=0.3)
    assert found.bias > 3 * found.error, "the bias shows"


def test_the_bias_falls_as_one_over_n() -> None:
    few, many = (bias.measured(SMALL, num, repeats=40) for num in (200, 800))
    assert few.bias / many.bias == pytest.approx(4, rel=0.35)


def test_picture_and_numbers(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bias, "NUMS", (100, 200))
    monkeypatch.setattr(bias, "REPEATS", 3)
    bias.main([str(tmp_path)])
    about = json.loads((tmp_path / "frechet_bias.json").read_text())
    assert [row["num"] for row in about["rows"]] == [100, 200] and about["dimensions"] == 64
    assert (tmp_path / "frechet_bias.png").read_bytes()[:4] == b"\x89PNG"
