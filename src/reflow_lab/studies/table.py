"""A study's cells as a table: values with intervals, and the effect of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifacts import read_json, write_atomically, write_json
from ..evaluation.intervals import Interval, difference, interval, mean_interval

if TYPE_CHECKING:
    from .study import Row, Study

Cell = dict[str, Any]
DIGITS = {"fd_lite0": 1, "fd_inception": 2, "fid": 2}  #: after the point, by the metric's name


COLUMNS = (
    "name",
    "overrides",
    "teacher",
    "nfe",
    "network_calls",
    "seed",
    "floor",
    "straightness",
    "ms_per_image",
    "peak_memory_mb",
    "device",
    "training",
    "sampler",
    "num_images",
    "intervals",
    "protocol",
    "run",
)


def write(out: Path, study: Study, cells: Sequence[Cell]) -> str:
    """Write table.json, a list of cells with COLUMNS and every metric, and table.md; returns the Markdown."""
    metrics = [*cells[0]["intervals"], *cells[0]["scores"]]
    write_json(out / "table.json", [{key: cell[key] for key in (*COLUMNS, *metrics)} for cell in cells])
    text = markdown(study, cells)
    write_atomically(out / "table.md", lambda p: p.write_text(text))
    return text


def markdown(study: Study, cells: Sequence[Cell]) -> str:
    """The whole page: distances, effects, the other columns. Without a teacher the distance to the data stands first."""
    metrics, floor = cells[0]["intervals"], against_itself(cells[0]["floor"])
    data = cells[0]["distance"]
    primary = f"{data}_teacher" if f"{data}_teacher" in metrics else data
    titles = {
        f"{data}_teacher": "distance to the teacher's many-step samples of the same noise",
        data: f"distance to the data (real against real: {floor})",
        f"{data}_added": "distance to the data beyond that of the teacher's many-step samples",
        "paired_rmse": "to the teacher's image of the same noise (rewards blur: a diagnostic)",
    }
    lines = [f"# {study.title}", "", heading(cells)]
    for name in (name for name in titles if name in metrics):
        lines += ["", f"## {name}: {titles[name]}", "", *grid(study, cells, name)]
        if name == primary and any(row.against for row in study.rows):
            title = f"## Effect of each row on {primary} (its value minus that of the row it is measured against)"
            lines += ["", title, "", *effects(study, cells, primary)]
    title = "## Straightness of the flow, and what sampling and training cost"
    lines += ["", title, "", *costs(study, cells), "", devices(cells), ""]
    lines += ["## Samplers", "", *samplers(study, cells), ""]
    return "\n".join(lines)


def against_itself(floor: float | None) -> str:
    """The distance of real samples to others; n/a where a data set has none to spare."""
    return "n/a" if floor is None else f"{floor:.4g}"


def heading(cells: Sequence[Cell]) -> str:
    """What the numbers below are: how many images and seeds, which intervals."""
    seeds = sorted({cell["seed"] for cell in cells})
    noise = "the held-out noise (bootstrap); one training seed"
    over = f"{len(seeds)} training seeds (Student's t)" if len(seeds) > 1 else noise
    listed = ", ".join(map(str, seeds))
    lines = (
        f"N = {cells[0]['num_images']:,} samples a cell; training seeds {listed}; 95 % intervals over {over}.",
        "All rows are measured on the same held-out noise, and against the same teacher where there is one. Lower is better.",
    )
    return " ".join(lines)


def header(columns: Sequence[object]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]


def show(value: Interval, metric: str, sign: str = "") -> str:
    """value ± half of the 95 % interval where there is one, in digits that suit the size of the metric."""
    half, digits = (value.high - value.low) / 2, next((n for name, n in DIGITS.items() if metric.startswith(name)), 4)
    return f"{value.value:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def of(cells: Sequence[Cell], name: str, nfe: int) -> list[Cell]:
    """The cells of a row by seed, at the number of steps asked for: an adaptive solver's own number is another."""
    return sorted((c for c in cells if c["name"] == name and c["protocol"]["nfe"] == nfe), key=lambda c: c["seed"])


def resampled(cell: Cell, metric: str) -> torch.Tensor:
    """The bootstrap values of a cell."""
    return torch.tensor(read_json(Path(cell["folder"]) / "resamples.json")[metric], dtype=torch.float64)


def estimate(cells: Sequence[Cell], metric: str) -> Interval:
    """Over seeds where there are several that differ (a row without training has none), else over the noise."""
    if len({cell[metric] for cell in cells}) > 1:
        return mean_interval([c[metric] for c in cells])
    return interval(cells[0][metric], resampled(cells[0], metric))


def effect(cells: Sequence[Cell], others: Sequence[Cell], metric: str) -> Interval:
    """The difference of two rows: paired by seed where there are several, else by the noise that both were drawn from."""
    if len(cells) > 1:
        return mean_interval([a[metric] - b[metric] for a, b in zip(cells, others, strict=True)])
    (a,), (b,) = cells, others
    return difference(a[metric], resampled(a, metric), b[metric], resampled(b, metric))


def grid(study: Study, cells: Sequence[Cell], metric: str) -> list[str]:
    """Rows by numbers of steps."""
    rows = [[row.name, *(show(estimate(of(cells, row.name, nfe), metric), metric) for nfe in study.nfe)] for row in study.rows]
    return [*header([f"{nfe} NFE" for nfe in study.nfe]), *("| " + " | ".join(row) + " |" for row in rows)]


def effects(study: Study, cells: Sequence[Cell], metric: str) -> list[str]:
    """The effect of every row that names another one."""

    def line(row: Row) -> str:
        found = [effect(of(cells, row.name, nfe), of(cells, str(row.against), nfe), metric) for nfe in study.nfe]
        return f"| {row.name} against {row.against} | " + " | ".join(show(value, metric, sign="+") for value in found) + " |"

    return [*header([f"{nfe} NFE" for nfe in study.nfe]), *(line(row) for row in study.rows if row.against)]


def costs(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Straightness and training once a row, milliseconds per image by steps, the most memory of all steps."""
    times = [f"ms at {nfe} NFE" for nfe in study.nfe]
    lines = [*header(["straightness", *times, "memory MB", "trained on kimg", "in seconds"])]
    for row in study.rows:
        at = [of(cells, row.name, nfe) for nfe in study.nfe]
        ms = [f"{mean([c['ms_per_image'] for c in found]):.2f}" for found in at]
        memory = max(c["peak_memory_mb"] for found in at for c in found)
        training = [shown([c["training"][key] for c in at[0]]) for key in ("kimg", "seconds")]
        straight = f"{mean([c['straightness'] for c in at[0]]):.4f}"
        lines.append("| " + " | ".join([row.name, straight, *ms, f"{memory:.0f}", *training]) + " |")
    return lines


def samplers(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Solver and grid by rows and numbers of steps: with `inf=auto` those that were found, which may differ between seeds."""

    def found(row: Row, nfe: int) -> str:
        return "; ".join(sorted({cell["sampler"] for cell in of(cells, row.name, nfe)}))

    rows = [[row.name, *(found(row, nfe) for nfe in study.nfe)] for row in study.rows]
    return [*header([f"{nfe} NFE" for nfe in study.nfe]), *("| " + " | ".join(row) + " |" for row in rows)]


def mean(values: Sequence[float]) -> float:
    """The mean over seeds."""
    return sum(values) / len(values)


def shown(values: Sequence[float | None]) -> str:
    """The mean of a training's cost over seeds; a dash where a run of an older version did not note it."""
    known = [value for value in values if value is not None]
    return f"{mean(known):.0f}" if len(known) == len(values) else "–"


def devices(cells: Sequence[Cell]) -> str:
    """Where times and memory were measured, and what they are of."""
    sampling, training = {c["device"] for c in cells}, {c["training"]["device"] for c in cells} - {None}
    where = f"Sampling on {', '.join(sorted(sampling))}; training on {', '.join(sorted(training)) or 'a device not noted'}."
    return f"{where} Memory: weights, and live tensors of a batch. Seconds: of training alone, pairs are drawn apart."
