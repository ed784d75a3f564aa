"""A study's result as the report reads it: table.json, and beside it traces.json and samples.png where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from ..artifacts import read_json
from ..errors import UserError
from ..studies import results

Entry = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """One folder: the document of table.json, the rows of traces.json, the bytes of samples.png."""

    folder: Path
    doc: Entry
    traces: dict[str, Entry]
    samples: bytes | None

    @property
    def title(self) -> str:
        """The study's title."""
        return str(self.doc["title"])

    @property
    def names(self) -> list[str]:
        """The rows, in their order."""
        return [row["name"] for row in self.doc["rows"]]

    @property
    def nfe(self) -> list[int]:
        """The numbers of steps."""
        return list(self.doc["nfe"])

    @property
    def metric(self) -> str:
        """The primary metric: lower is better."""
        return str(self.doc["metric"])

    @property
    def cells(self) -> list[Entry]:
        """All cells: a row, a seed and a number of steps each."""
        return list(self.doc["cells"])

    @cached_property
    def _estimates(self) -> dict[tuple[str, int, str], Entry]:
        return {(e["name"], e["nfe"], e["metric"]): e for e in self.doc["estimates"]}

    def estimate(self, name: str, nfe: int, metric: str) -> Entry | None:
        """A row's value, with `low` and `high` of its interval, null where there is none."""
        return self._estimates.get((name, nfe, metric))

    def effects(self, nfe: int, metric: str) -> list[Entry]:
        """The paired differences at a number of steps, in the rows' order."""
        found = [e for e in self.doc["effects"] if (e["nfe"], e["metric"]) == (nfe, metric)]
        return sorted(found, key=lambda e: self.names.index(e["name"]))

    def at(self, name: str, nfe: int) -> list[Entry]:
        """The cells of a row, by seed, at the number of steps that was asked for."""
        return results.of(self.cells, name, nfe)

    def mean(self, name: str, nfe: int, key: str) -> float | None:
        """The mean over seeds of a number in the cells; None where a cell lacks it."""
        return mean([cell.get(key) for cell in self.at(name, nfe)])

    def training(self, name: str, key: str) -> float | None:
        """The mean over seeds of what training cost: kimg or seconds; None where it was not noted."""
        return mean([cell["training"][key] for cell in self.at(name, self.nfe[0])])

    def seed_differences(self, name: str, against: str, nfe: int, metric: str) -> list[float]:
        """The effect in each seed; nothing with one seed, whose difference is the effect itself."""
        both = zip(self.at(name, nfe), self.at(against, nfe), strict=False)
        found = [a[metric] - b[metric] for a, b in both if a["seed"] == b["seed"]]
        return found if len(found) > 1 else []


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known whole."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def read(folder: Path) -> Loaded:
    """Read a study's folder; raises a `UserError` that names what is missing, broken or changed by hand."""
    doc, samples = results.read(folder), folder / "samples.png"
    return Loaded(folder, doc, traces(folder / "traces.json"), samples.read_bytes() if samples.exists() else None)


def traces(path: Path) -> dict[str, Entry]:
    """The rows of a traces.json, none where there is no such file."""
    found = read_json(path) if path.exists() else {"rows": {}}
    if not isinstance(found, dict) or not isinstance(found.get("rows"), dict):
        raise UserError(f"{path}: not the traces of a study; delete it, and the study writes it again")
    return {str(name): row for name, row in found["rows"].items()}
