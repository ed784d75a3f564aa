"""The result of a study as one JSON file, from which every table, page and report is made; a file changed by hand is refused."""

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import reflow_lab

from ..artifacts import digest, read_json, write_json
from ..errors import UserError
from ..evaluation.intervals import Interval, difference, mean_interval
from ..evaluation.wording import PAIRED, distances
from .description import LINKS, Row, Study

Cell = dict[str, Any]
Result = dict[str, Any]
FILE = "table.json"
SEAL = "sha256"  #: the key of the checksum, which is of all others
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


def build(study: Study, cells: Sequence[Cell], data: str, given: Sequence[str]) -> Result:
    """All that is told of a study. given: the words of its command line; data: the data set, by which the paper's numbers go."""
    first = cells[0]
    names, metrics = [*first["intervals"], *first["scores"]], distances(first["distance"], first["intervals"])
    metrics += [PAIRED] if PAIRED in names else []
    return {
        "study": study.name,
        "title": study.title,
        "data": data,
        "command": command(study, given),
        "nfe": list(study.nfe),
        "seeds": sorted({cell["seed"] for cell in cells}),
        "metric": metrics[0],
        "metrics": metrics,
        "distance": first["distance"],
        "paper": study.paper,
        "rows": [about(study, row, data, given) for row in study.rows],
        "estimates": list(estimates(study, cells, metrics)),
        "effects": list(effects(study, cells, metrics)),
        "cells": [{key: cell[key] for key in (*COLUMNS, *names)} for cell in cells],
        "failed": [],
        "code": reflow_lab.__version__,
    }


def about(study: Study, row: Row, data: str, given: Sequence[str]) -> dict[str, Any]:
    """A row as it is described, with the paper's number for this data set, None where it is unknown, and its command."""
    said = {"name": row.name, "overrides": list(row.overrides), **{key: getattr(row, key) for key in ("against", *LINKS)}}
    return {**said, "paper": row.paper.get(data), "command": command(study, given, row.name)}


def command(study: Study, given: Sequence[str], row: str | None = None) -> str:
    """The command that makes the table, or one row of it, as one types it."""
    words = [word for word in given if not word.startswith(("study=", "out=", "outputs=", *(["rows="] if row else [])))]
    only = [] if row is None else [f'rows=["{row}"]']
    return shlex.join(["reflow-lab", "study", f"study={study.name}", *words, *only])


def of(cells: Sequence[Cell], name: str, nfe: int) -> list[Cell]:
    """The cells of a row by seed, at the number of steps asked for: an adaptive solver's own number is another."""
    return sorted((c for c in cells if c["name"] == name and c["protocol"]["nfe"] == nfe), key=lambda c: c["seed"])


def estimates(study: Study, cells: Sequence[Cell], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row's metrics at each number of steps."""
    for metric in metrics:
        for row in study.rows:
            for nfe in study.nfe:
                found = estimate(of(cells, row.name, nfe), metric)
                yield {"name": row.name, "nfe": nfe, "metric": metric, **ends(found)}


def effects(study: Study, cells: Sequence[Cell], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row's difference to the row that it is measured against."""
    for metric in metrics:
        for row in study.rows if any(row.against for row in study.rows) else ():
            for nfe in study.nfe if row.against else ():
                found = effect(of(cells, row.name, nfe), of(cells, str(row.against), nfe), metric)
                yield {"name": row.name, "against": row.against, "nfe": nfe, "metric": metric, **ends(found)}


def ends(found: Interval) -> dict[str, float | None]:
    """Value and ends of the interval; None for the ends where there is none, which JSON can say."""
    low, high = (None if end != end else end for end in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


def estimate(cells: Sequence[Cell], metric: str) -> Interval:
    """Over seeds where there are several that differ (a row without training has none), else over the noise."""
    if len({cell[metric] for cell in cells}) > 1:
        return mean_interval([c[metric] for c in cells])
    return Interval(cells[0][metric], math.nan, *cells[0]["intervals"][metric])


def effect(cells: Sequence[Cell], others: Sequence[Cell], metric: str) -> Interval:
    """The difference of two rows: paired by seed where there are several, else by the noise that both were drawn from.

    Two rows of which neither trains are the same in every seed, and vary with the noise alone.
    """
    if any(len({cell[metric] for cell in row}) > 1 for row in (cells, others)):
        return mean_interval([a[metric] - b[metric] for a, b in zip(cells, others, strict=True)])
    a, b = cells[0], others[0]
    return difference(a[metric], resampled(a, metric), b[metric], resampled(b, metric))


def resampled(cell: Cell, metric: str) -> torch.Tensor:
    """The bootstrap values of a cell."""
    return torch.tensor(read_json(Path(cell["folder"]) / "resamples.json")[metric], dtype=torch.float64)


def seal(result: Result) -> str:
    """The checksum of a result, its own entry left out."""
    return digest({key: value for key, value in result.items() if key != SEAL})


def write(folder: Path, result: Result) -> Result:
    """Write FILE; returns what it holds, sealed."""
    sealed = {**result, SEAL: seal(result)}
    write_json(folder / FILE, sealed)
    return sealed


def require_whole(out: Path) -> None:
    """Raise a `UserError`, before any work, where `out` holds a result that was changed by hand, or none."""
    try:
        if (out / FILE).exists():
            read(out)
    except UserError as error:
        raise UserError(f"{error}; remove it, or choose another out") from None


def place(out: Path, result: Result) -> Path:
    """Where a result goes: `out`, or out/partial where that holds more rows or seeds of the same study."""
    if not (out / FILE).exists():
        return out
    there = read(out)
    lost = [
        {row["name"] for row in there["rows"]} - {row["name"] for row in result["rows"]},
        {*there["seeds"]} - {*result["seeds"]},
    ]
    return out / "partial" if there["study"] == result["study"] and any(lost) else out


def read(path: Path) -> Result:
    """A result by its file or folder; raises a `UserError` for one that is none, or that was changed after it was written."""
    file = path / FILE if path.is_dir() else path
    found = read_json(file)
    if not isinstance(found, dict) or SEAL not in found:
        raise UserError(f"{file}: not the result of a study: it has no {SEAL}")
    if found[SEAL] != seal(found):
        raise UserError(f"{file}: was changed after it was written: its {SEAL} is {found[SEAL]}, its content's is {seal(found)}")
    return found
