import math
import operator
import os

import pytest

from reflow_lab.data.workers import in_order, sensible_workers
from reflow_lab.errors import UserError


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(in_order(operator.neg, range(50), workers)) == [-task for task in range(50)]


def test_the_work_is_done_elsewhere_and_its_error_comes_here():
    results = in_order(math.sqrt, [4.0, -1.0, 9.0], 2)
    assert next(results) == 2.0
    with pytest.raises(ValueError, match="domain"):
        next(results)


def test_a_process_that_was_killed_is_one_line():
    with pytest.raises(
        UserError, match=r"^a worker process ended before its time, perhaps for want of memory: try fewer workers$"
    ):
        list(in_order(os._exit, [1, 1, 1], 2))


def test_a_process_for_every_so_many_files(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    assert [sensible_workers(count, 50_000) for count in (1, 99_999, 160_000, 10**6)] == [1, 1, 3, 16]
