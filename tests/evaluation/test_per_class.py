import pytest
import torch

from reflow_lab.evaluation.frechet import Reference
from reflow_lab.evaluation.per_class import ClassDistance, distance_of_few, members, summary, usable
from reflow_lab.gaussian import w2_squared


@pytest.mark.parametrize("num_a, num_b, dim", [(40, 40, 6), (30, 50, 6), (20, 20, 60), (20, 33, 60), (2, 3, 10)])
def test_it_is_the_frechet_distance_with_many_and_few_samples(num_a: int, num_b: int, dim: int) -> None:
    mix = torch.randn(dim, dim)
    a, b = torch.randn(num_a, dim) @ mix + 0.3, torch.randn(num_b, dim)
    assert distance_of_few(a, b) == pytest.approx(Reference.of(a).distance(b), rel=1e-6)
    assert distance_of_few(a, b) == pytest.approx(distance_of_few(b, a))
    exact = w2_squared(a.double().mean(0), a.double().mT.cov(), b.double().mean(0), b.double().mT.cov())
    assert distance_of_few(a, b) == pytest.approx(exact.item(), rel=1e-6)


def test_of_a_set_to_itself_it_is_0_and_of_a_shifted_one_the_shift() -> None:
    a = torch.randn(30, 100)
    assert distance_of_few(a, a) == pytest.approx(0, abs=1e-9)
    assert distance_of_few(a, a + 0.5) == pytest.approx(25, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        distance_of_few(a, a[:1])


def test_members_of_a_class_are_its_first_images() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    assert members(labels, 2, 2).tolist() == [0, 2]
    assert members(labels, 0, 9).tolist() == [1, 5]
    assert members(labels, 7, 9).tolist() == []


@pytest.mark.parametrize(
    "reference, floor, expected",
    [(300, 300, (200, True)), (80, 300, (80, True)), (300, 70, (70, True)), (300, 20, (200, False)), (10, 0, (10, False))],
)
def test_sets_of_one_number(reference: int, floor: int, expected: tuple[int, bool]) -> None:
    assert usable(reference, floor, most=200, least=50) == expected


def test_the_summary_leaves_out_what_has_no_distance() -> None:
    found = [ClassDistance(0, 50, 3.0, 1.0), ClassDistance(1, 9, None, None), ClassDistance(2, 50, 5.0, None)]
    assert summary(found) == {"mean": 4.0, "worst": 5.0, "worst_class": 2.0, "mean_floor": 1.0}
    assert summary(found[1:2]) == {}
