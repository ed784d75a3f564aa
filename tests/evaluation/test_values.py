import math
import subprocess
import sys

import pytest

from reflow_lab.evaluation.values import distances, plus_minus, primary


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["fid", "fid_teacher", "fid_added", "kid"], ["fid_teacher", "fid", "fid_added"]),
        (["fid"], ["fid"]),
    ],
)
def test_the_distance_to_the_teacher_comes_first(known, expected):
    assert distances("fid", known) == expected and primary("fid", dict.fromkeys(known, 1.0)) == expected[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((123.456, 7.891), "123.5 ± 7.9"),
        ((123.456, 7.891, 2), "123.46 ± 7.89"),
        ((0.0, 0.0, 1, "+"), "+0.0 ± 0.0"),
        ((-1.5, math.nan, 1, "+"), "-1.5"),
        ((1234567.0,), "1.235e+06"),
    ],
)
def test_value_and_half(given, expected):
    assert plus_minus(*given) == expected


def test_it_starts_without_torch():
    code = "import sys; from reflow_lab.evaluation import values; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
