"""A study's cells as a table: values with intervals, and the effect of each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifacts import read_json, write_atomically, write_json
from ..evaluation.intervals import Interval, difference, interval, mean_interval

if TYPE_CHECKING:
    from .study import Row, Study

Cell = dict[str, Any]


def write(out: Path, study: Study, cells: Sequence[Cell]) -> str:
    """Write table.json and table.md; returns the Markdown."""
    columns = ("name", "overrides", "nfe", "seed", "floor", "straightness", "ms_per_image", "num_images", "intervals", "run")
    metrics = list(cells[0]["intervals"])
    write_json(out / "table.json", [{key: cell[key] for key in (*columns, *metrics)} for cell in cells])
    text = markdown(study, cells)
    write_atomically(out / "table.md", lambda p: p.write_text(text))
    return text


def markdown(study: Study, cells: Sequence[Cell]) -> str:
    """The whole page: distances, effects, the other columns."""
    primary = next(k for k in cells[0]["intervals"] if k.startswith("fd_") and k.endswith("_teacher"))
    data = primary.removesuffix("_teacher")
    seeds = sorted({c["seed"] for c in cells})
    count, floor = cells[0]["num_images"], cells[0]["floor"]
    over = (
        f"over {len(seeds)} training seeds (Student's t)"
        if len(seeds) > 1
        else "over the held-out noise (bootstrap); one training seed"
    )
    return "\n".join(
        [
            f"# {study.title}",
            "",
            f"N = {count:,} images a cell; training seeds {', '.join(map(str, seeds))}; 95 % intervals {over}. Lower is better.",
            "",
            f"## {primary}: distance to the teacher's many-step samples of the same noise",
            "",
            *grid(study, cells, primary),
            "",
            f"## Effect of each row on {primary} (its value minus that of the row it is measured against)",
            "",
            *effects(study, cells, primary),
            "",
            f"## {data}: distance to the data (real against real: {floor:.1f})",
            "",
            *grid(study, cells, data),
            "",
            "## paired_rmse to the teacher's image of the same noise (rewards blur: a diagnostic)",
            "",
            *grid(study, cells, "paired_rmse", 3),
            "",
            "## Straightness of the flow, and milliseconds per image",
            "",
            *costs(study, cells),
            "",
        ]
    )


def header(columns: Sequence[object]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]


def show(value: Interval, digits: int = 1, sign: str = "") -> str:
    """value ± half of the 95 % interval."""
    half = (value.high - value.low) / 2
    return f"{value.value:{sign}.{digits}f} ± {half:.{digits}f}" if half == half else f"{value.value:{sign}.{digits}f}"


def of(cells: Sequence[Cell], name: str, nfe: int) -> list[Cell]:
    """The cells of a row at a number of steps, by seed."""
    return sorted((c for c in cells if c["name"] == name and round(c["nfe"]) == nfe), key=lambda c: c["seed"])


def resampled(cell: Cell, metric: str) -> torch.Tensor:
    """The bootstrap values of a cell."""
    return torch.tensor(read_json(Path(cell["folder"]) / "resamples.json")[metric], dtype=torch.float64)


def estimate(cells: Sequence[Cell], metric: str) -> Interval:
    """Over seeds where there are several, else over the noise."""
    if len(cells) > 1:
        return mean_interval([c[metric] for c in cells])
    return interval(cells[0][metric], resampled(cells[0], metric))


def effect(cells: Sequence[Cell], others: Sequence[Cell], metric: str) -> Interval:
    """The difference of two rows: paired by seed where there are several, else by the noise that both were drawn from."""
    if len(cells) > 1:
        return mean_interval([a[metric] - b[metric] for a, b in zip(cells, others, strict=True)])
    (a,), (b,) = cells, others
    return difference(a[metric], resampled(a, metric), b[metric], resampled(b, metric))


def grid(study: Study, cells: Sequence[Cell], metric: str, digits: int = 1) -> list[str]:
    """Rows by numbers of steps."""
    rows = [[row.name, *(show(estimate(of(cells, row.name, nfe), metric), digits) for nfe in study.nfe)] for row in study.rows]
    return [*header([f"{nfe} NFE" for nfe in study.nfe]), *("| " + " | ".join(row) + " |" for row in rows)]


def effects(study: Study, cells: Sequence[Cell], metric: str) -> list[str]:
    """The effect of every row that names another one."""

    def line(row: Row) -> str:
        found = [effect(of(cells, row.name, nfe), of(cells, str(row.against), nfe), metric) for nfe in study.nfe]
        return f"| {row.name} against {row.against} | " + " | ".join(show(value, sign="+") for value in found) + " |"

    return [*header([f"{nfe} NFE" for nfe in study.nfe]), *(line(row) for row in study.rows if row.against)]


def costs(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Straightness once a row, time by steps."""

    def mean(found: Sequence[Cell], key: str) -> float:
        return sum(c[key] for c in found) / len(found)

    lines = []
    for row in study.rows:
        at = [of(cells, row.name, nfe) for nfe in study.nfe]
        times = " | ".join(f"{mean(found, 'ms_per_image'):.2f}" for found in at)
        lines.append(f"| {row.name} | {mean(at[0], 'straightness'):.4f} | {times} |")
    return [*header(["straightness", *(f"ms at {nfe} NFE" for nfe in study.nfe)]), *lines]
