"""The result of a study from its cells: each row's metrics over seeds or noise, the effect of each row, all that is told."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import reflow_lab

from ..artifacts import read_json
from ..evaluation.intervals import difference, mean_interval
from ..evaluation.values import PAIRED, SPREAD, Interval, distances
from .description import Study
from .results import Cell, Result, about, command, of

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
    metrics += [name for name in (PAIRED, *first["scores"]) if name in names and not name.endswith(SPREAD)]
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
    """Over seeds where there are several that differ (a row without training has none), else over the noise.

    Scores have no interval over the noise.
    """
    if len({cell[metric] for cell in cells}) > 1:
        return mean_interval([c[metric] for c in cells])
    return Interval(cells[0][metric], math.nan, *cells[0]["intervals"].get(metric, (math.nan, math.nan)))


def effect(cells: Sequence[Cell], others: Sequence[Cell], metric: str) -> Interval:
    """The difference of two rows: paired by seed where there are several, else by the noise that both were drawn from.

    Two rows of which neither trains are the same in every seed, and vary with the noise alone.
    """
    if any(len({cell[metric] for cell in row}) > 1 for row in (cells, others)):
        return mean_interval([a[metric] - b[metric] for a, b in zip(cells, others, strict=True)])
    a, b = cells[0], others[0]
    if metric in a["scores"]:
        return Interval(a[metric] - b[metric], math.nan, math.nan, math.nan)
    return difference(a[metric], resampled(a, metric), b[metric], resampled(b, metric))


def resampled(cell: Cell, metric: str) -> torch.Tensor:
    """The bootstrap values of a cell."""
    return torch.tensor(read_json(Path(cell["folder"]) / "resamples.json")[metric], dtype=torch.float64)
