"""Values of an evaluation: with intervals, how they are written, what distances are called. Needs no torch."""

import math
from collections.abc import Container
from typing import NamedTuple

TEACHER = "_teacher"  #: of the distance to the teacher's many-step samples of the same noise
ADDED = "_added"  #: of the distance to the data, less that of the teacher's many-step samples
PAIRED = "paired_rmse"  #: to the teacher's sample of the same noise
SPREAD = "_std"  #: of a score over subsets or splits, beside the score
Z95 = 1.959963984540054  #: half of a normal 95 % interval, in standard errors


class Interval(NamedTuple):
    """A value, its standard deviation (error) and the ends of its 95 % interval."""

    value: float
    std: float
    low: float
    high: float


def distances(name: str, known: Container[str]) -> list[str]:
    """The variants of a distance that are known, the primary one first: to the teacher, to the data, added to the teacher's."""
    return [name + suffix for suffix in (TEACHER, "", ADDED) if name + suffix in known]


def primary(name: str, known: Container[str]) -> str:
    """The metric that flows are compared by: the distance to the teacher's samples where there is a teacher, else to the data."""
    return distances(name, known)[0]


def plus_minus(value: float, half: float = math.nan, digits: int | None = None, sign: str = "") -> str:
    """value ± half of the 95 % interval, the value alone where that is NaN.

    digits: after the point, for columns; None: four significant ones of the value and two of the half. sign: "+" shows it.
    """
    of_value, of_half = (".4g", ".2g") if digits is None else (f".{digits}f", f".{digits}f")
    return f"{value:{sign}{of_value}}" + ("" if math.isnan(half) else f" ± {half:{of_half}}")
