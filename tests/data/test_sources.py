import numpy as np
import pytest

from reflow_lab.data.sources import partition, reading, require_facts, require_split
from reflow_lab.errors import UserError


def test_partition_is_disjoint_complete_and_balanced():
    strata = np.repeat([0, 1, 2], [8, 40, 400])
    parts = partition(strata, (0.5, 0.25, 0.25), "test")
    assert sorted(np.concatenate(parts)) == list(range(448))
    assert [np.bincount(strata[part]).tolist() for part in parts] == [[4, 20, 200], [2, 10, 100], [2, 10, 100]]


@pytest.mark.parametrize(("num", "sizes"), [(9, [7, 2]), (10, [8, 2]), (11, [8, 3]), (1, [0, 1])])
def test_partition_rounds_down_at_each_cut(num, sizes):
    assert [len(part) for part in partition(np.zeros(num, np.int64), (0.8, 0.2), "test")] == sizes


def test_partition_depends_on_the_stream_alone():
    strata = np.zeros(50, np.int64)
    one, again, other = (partition(strata, (0.5, 0.5), stream)[0].tolist() for stream in ("a", "a", "b"))
    assert one == again != other


def test_every_stretch_of_a_part_mixes_the_strata():
    strata = np.arange(4000) % 4
    for part in partition(strata, (0.5, 0.25, 0.25), "test"):
        for stretch in (part[:200], part[-200:]):
            assert np.bincount(strata[stretch], minlength=4).min() > 25  # 50 expected, standard deviation 6


def test_unknown_split_is_named():
    with pytest.raises(UserError, match="split=test: must be one of train, reference, floor"):
        require_split("test")


def test_contradicted_fact_is_named():
    with pytest.raises(UserError, match=r"data\.channels=1: CIFAR-10 has 3"):
        require_facts("CIFAR-10", {"channels": 1}, {"channels": 3})


def test_reading_makes_one_line_of_any_error():
    with pytest.raises(UserError) as caught, reading("data.path=x", "batch"):
        raise ValueError("two\n  lines")
    assert str(caught.value) == "data.path=x: not a readable batch (ValueError: two lines)"


def test_reading_passes_user_errors_and_interrupts():
    with pytest.raises(UserError, match=r"^mine$"), reading("data.path=x", "batch"):
        raise UserError("mine")
    with pytest.raises(KeyboardInterrupt), reading("data.path=x", "batch"):
        raise KeyboardInterrupt
