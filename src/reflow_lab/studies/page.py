"""The verb `tables`: one page, a section a study, from the results that are there; "not run" where there is none."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser
from ..artifacts import write_atomically
from ..errors import UserError, require
from . import results, table
from .description import Study, read
from .results import Result

INTRODUCTION = """\
# Studies, and what they found

Made by `make tables` from the results in [{0}]({0}), each of which is sealed: a file that was changed by hand is refused.
Every study is one file; its rows are overrides of the configuration. `make table-NAME SCALE=mini SEEDS=3 DATA=...` runs one, and
goes on where it was interrupted. Distances depend on the features, which their names say, and on the number of samples: compare
within a table only. Lower is better; intervals are of 95 %. The paper's numbers are FID, of other sizes: n/a where unknown."""


def main(argv: Sequence[str]) -> None:
    """Write the page of a folder of studies into it, or beside the results; raises a `UserError` for one that was changed."""
    parser = Parser(prog="reflow-lab tables", description="The results of studies on one page, README.md.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", default=Path("experiments"), help="of the studies")
    where = (
        "where results lie, at any depth, and the page goes; without it they lie in FOLDER/results and the page goes to FOLDER"
    )
    parser.add_argument("--results", type=Path, default=argparse.SUPPRESS, help=where)
    args = parser.parse_args(argv)
    given = getattr(args, "results", None)
    require(args.folder.is_dir(), "FOLDER", args.folder, "no such folder; it holds studies")
    require(given is None or given.is_dir(), "--results", given, "no such folder; it holds results of studies, e.g. outputs")
    path = (given or args.folder) / "README.md"
    text = page(args.folder, given or args.folder / "results", path.parent)
    write_atomically(path, lambda p: p.write_text(text))
    print(f"written: {path}")


def page(folder: Path, kept: Path, place: Path) -> str:
    """The whole page of the studies in `folder` with their results in `kept`; its links begin in `place`."""
    found = {os.path.relpath(at, place): results.read(at) for at in results.found(kept)}
    names = [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.yaml"))]
    about = {name: {at: result for at, result in found.items() if result["study"] == name} for name in names}
    sections = [section(folder, place, name, those) for name, those in about.items()]
    return "\n\n".join([INTRODUCTION.format(os.path.relpath(kept, place)), *sections]) + "\n"


def section(folder: Path, place: Path, name: str, found: dict[str, Result]) -> str:
    """A study with its results, or with the command that makes them."""
    try:
        study = read(folder / f"{name}.yaml")
    except UserError as error:  # somebody's unfinished file keeps no other from the page
        return f"## {name}\n\n{error}"
    title = f"## [{name}]({os.path.relpath(folder / name, place)}.yaml): {study.title}"
    if not found:
        return f"{title}\n\nNot run: `{how(name)}`{unknown(study)}"
    return "\n\n".join([title, *(told(place, at, result) for at, result in found.items())])


def how(name: str) -> str:
    """The command that runs a study."""
    group, _, short = name.rpartition("/")
    return f"make table-{short}" if group == "simple_reflow" else f"reflow-lab study study={name}"


def unknown(study: Study) -> str:
    """The paper's numbers of a study that was not run."""
    known = [(row.name, data, found) for row in study.rows for data, found in row.paper.items()]
    said = "; ".join(f"{name}, {data}: {found['value']} [{found['source']}]" for name, data, found in known)
    return f"\n\nThe paper ({study.paper}): {said}" if said else ""


def told(place: Path, at: str, result: Result) -> str:
    """A result: how it was made, its primary table, the effects."""
    metric, cells = result["metric"], result["cells"]
    more = f"[the whole table]({at}/table.md)" if (place / at / "table.md").exists() else f"[its cells]({at}/{results.FILE})"
    lines = [f"On {result['data']}: `{result['command']}`; {more}, seal `{result[results.SEAL]}`.", table.heading(result)]
    lines += [f"**{metric}**, {table.meaning(metric, cells)}:", "\n".join(table.grid(result, metric).lines())]
    if result["effects"]:
        lines += ["Effects:", "\n".join(table.effects(result, metric).lines())]
    return "\n\n".join(lines)
