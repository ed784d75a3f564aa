"""The result of a study as one JSON file, from which every table, page and report is made; a file changed by hand is refused."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifacts import digest, read_json, write_json
from ..errors import UserError
from .description import LINKS, Row, Study

Cell = dict[str, Any]
Result = dict[str, Any]
FILE = "table.json"
NO_STUDIES = ("sweeps", "search")  #: folders in which `evaluate` and `search` keep tables, which are no study's
SEAL = "sha256"  #: the key of the checksum, which is of all others


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


def found(root: Path) -> list[Path]:
    """Every folder with a study's result below this one."""
    return [path.parent for path in sorted(root.rglob(FILE)) if path.parent.parent.name not in NO_STUDIES]


def read(path: Path) -> Result:
    """A result by its file or folder; raises a `UserError` for one that is none, or that was changed after it was written."""
    file = path / FILE if path.is_dir() else path
    found = read_json(file)
    if not isinstance(found, dict) or SEAL not in found:
        raise UserError(f"{file}: not the result of a study: it has no {SEAL}")
    if found[SEAL] != seal(found):
        raise UserError(f"{file}: was changed after it was written: its {SEAL} is {found[SEAL]}, its content's is {seal(found)}")
    return found
