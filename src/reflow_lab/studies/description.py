"""A study file: rows that share overrides and are measured at the same numbers of steps, one file a table of the paper."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, require
from ..paths import experiments_dirs

Paper = dict[str, dict[str, Any]]  #: data set -> value and its source, a tag of where the number was read
OPTIONAL = ("against", "teacher", "start", "weak", "guide", "paper")  #: keys of a row beside name and overrides
LINKS = ("teacher", "start", "weak", "guide")  #: that name an earlier row, whose run of the same seed is used


@dataclass(frozen=True)
class Row:
    """One row: a name, the overrides that make it, the row against which its effect is measured.

    `teacher` names an earlier row, whose run (of the same seed) makes this one's pairs and starts it: k-fold ReFlow. Without it
    the study's teacher does. All rows are measured against the study's teacher. `start` names an earlier row from whose run
    training starts, whoever teaches: a second stage. `weak` and `guide` name an earlier row whose run is the weaker velocity of
    autoguidance: that of the teacher from whom a flow map learns, and that of the row's own samples. `paper` is the paper's
    number by data set.
    """

    name: str
    overrides: tuple[str, ...]
    against: str | None = None
    teacher: str | None = None
    start: str | None = None
    weak: str | None = None
    guide: str | None = None
    paper: Paper = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Study:
    """What a study file says; `paper` tells what the rows' paper numbers are of."""

    title: str
    overrides: tuple[str, ...]
    nfe: tuple[int, ...]
    rows: tuple[Row, ...]
    paper: str | None = None
    name: str = ""  #: by which the command line calls it

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)


def load(name: str) -> Study:
    """The study of this name."""
    return replace(read(find(name)), name=name)


def find(name: str) -> Path:
    """The file of a study, in ./experiments or among those that ship."""
    folders = experiments_dirs()
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = sorted({str(p.relative_to(folder).with_suffix("")) for folder in folders for p in folder.rglob("*.yaml")})
    raise UserError(f"study={name}: no such study; there are {', '.join(known)}")


def read(path: Path) -> Study:
    """Read a study file; raises a `UserError` that names the file and what is wrong with it."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a study: {' '.join(str(error).split())}") from None
    _keys(path, "the file", raw, {"title", "overrides", "nfe", "rows"}, ("paper",))
    _list(path, "rows", raw["rows"], dict)
    for row in raw["rows"]:
        _keys(path, "a row", row, {"name", "overrides"}, OPTIONAL)
    rows = tuple(_row(path, row) for row in raw["rows"])
    nfe = _list(path, "nfe", raw["nfe"], int)
    require(min(nfe, default=0) >= 1, f"{path}: nfe", list(nfe), "must be numbers of at least 1")
    require(bool(rows), f"{path}: rows", [], "must be at least one")
    _names(path, [row.name for row in rows], rows)
    return Study(str(raw["title"]), _list(path, "overrides", raw["overrides"], str), nfe, rows, raw.get("paper"))


def _row(path: Path, raw: dict[str, Any]) -> Row:
    name, overrides = str(raw["name"]), _list(path, "overrides", raw["overrides"], str)
    links = {key: raw.get(key) for key in ("against", *LINKS)}
    return Row(name, overrides, **links, paper=_paper(path, name, raw.get("paper", {})))


def _paper(path: Path, name: str, raw: Any) -> Paper:
    fits = isinstance(raw, dict) and all(isinstance(found, dict) and {*found} == {"value", "source"} for found in raw.values())
    require(fits, f"{path}: {name}.paper", raw, "must be data set: {value: number, source: where it was read}")
    return {str(data): dict(found) for data, found in raw.items()}


def _keys(path: Path, what: str, node: object, needed: set[str], optional: Iterable[str] = ()) -> None:
    given = set(node) if isinstance(node, dict) else set()
    fits = needed <= given <= needed.union(optional)
    listed = ", ".join(sorted(needed)) + "".join(f", maybe {key}" for key in optional)
    if not fits:
        raise UserError(f"{path}: not a study: {what} has the keys {sorted(map(str, given))}; it wants {listed}")


def _list(path: Path, key: str, value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{path}: not a study: {key}={value}: must be a list of {kind.__name__}")
    return tuple(value)


def _names(path: Path, names: list[str], rows: Sequence[Row]) -> None:
    require(len(set(names)) == len(names), f"{path}: rows", names, "names must differ")
    for number, row in enumerate(rows):
        others, earlier = [name for name in names if name != row.name], names[:number]
        require(row.against in (None, *others), f"{path}: {row.name}.against", row.against, f"must be one of {', '.join(others)}")
        allowed = f"must be one of the rows before it: {', '.join(earlier) or 'there are none'}"
        for link in LINKS:
            require(getattr(row, link) in (None, *earlier), f"{path}: {row.name}.{link}", getattr(row, link), allowed)


def chosen(study: Study, names: Sequence[str] | None) -> Study:
    """The study with these of its rows, in its own order; an effect is left out where the row it is measured against is."""
    known = [row.name for row in study.rows]
    wanted = known if names is None else [names] if isinstance(names, str) else list(map(str, names))
    require(bool(wanted) and set(wanted) <= set(known), "rows", wanted, f"must be some of {', '.join(known)}")
    rows = tuple(row if row.against in wanted else replace(row, against=None) for row in study.rows if row.name in wanted)
    return replace(study, rows=rows)
