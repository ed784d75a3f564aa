"""What a sweep of `evaluate` found, as a table and a plot: quality against the number of steps, or whatever number was varied."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts import digest, write_atomically, write_json
from ..studies.table import against_itself, header, show
from .values import Interval, distances, primary

DASHES = ("-", (0, (4, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))  #: of matplotlib's lines, in points
MARKS = "osD^vP"  #: of matplotlib
VARIED = ("weights", "profile", "solver", "grid", "nfe", "t_max", "guidance")  #: parts of a protocol that a table is about


class Job(NamedTuple):
    """One evaluation of a sweep: the words that made it, and its metrics."""

    words: dict[str, str]
    metrics: dict[str, Any]


class Layout(NamedTuple):
    """How a sweep is laid out: the key along the columns and its values, and the other varied keys, one row a combination."""

    columns: str
    values: list[str]
    rows: list[str]


def finish(jobs: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> None:
    """Write table.md, table.json, quality.png and quality.svg of a sweep's jobs, (overrides, metrics) each; print the table."""
    found = [Job(dict(word.lstrip("+~").partition("=")[::2] for word in words), metrics) for words, metrics in jobs]
    fixed = [part for part in found[0].metrics["protocol"] if part not in VARIED]
    if differing := [part for part in fixed if len({digest(job.metrics["protocol"].get(part)) for job in found}) > 1]:
        print(f"no table: the cells differ in how they are measured ({', '.join(differing)}), so they do not compare")
        return
    out = Path(found[0].metrics["folder"]).parents[1] / "sweeps" / digest([[job.words, job.metrics["protocol"]] for job in found])
    out.mkdir(parents=True, exist_ok=True)
    made, text = layout(found), markdown(found)
    write_json(out / "table.json", [{"words": job.words, **job.metrics} for job in found])
    write_atomically(out / "table.md", lambda p: p.write_text(text))
    for kind in ("png", "svg"):
        write_atomically(out / f"quality.{kind}", functools.partial(plot, found, made, kind))
    print(text)
    print(f"written: {out}/table.md, table.json, quality.png, quality.svg")


def layout(jobs: Sequence[Job]) -> Layout:
    """The number of steps along the columns, where it was varied; else the first varied number; else the last varied key."""
    varied = [key for key in jobs[0].words if len({job.words[key] for job in jobs}) > 1]
    numeric = [key for key in varied if all(is_number(job.words[key]) for job in jobs)]
    columns = "nfe" if "nfe" in varied else (numeric or varied[-1:] or list(jobs[0].words)[-1:])[0]
    values = list(dict.fromkeys(job.words[columns] for job in jobs))
    return Layout(columns, sorted(values, key=float) if columns in numeric else values, [key for key in varied if key != columns])


def is_number(word: str) -> bool:
    """Whether a word of the command line is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def series(jobs: Sequence[Job], made: Layout) -> dict[str, dict[str, Job]]:
    """The jobs by row and by the value along the columns."""
    rows: dict[str, dict[str, Job]] = {}
    for job in jobs:
        name = ", ".join(row_word(key, job.words[key]) for key in made.rows) or "all"
        rows.setdefault(name, {})[job.words[made.columns]] = job
    return rows


def row_word(key: str, value: str) -> str:
    """A member of a group by its name alone, a value with the last part of its key."""
    return value if "/" in key else f"{key.rpartition('.')[2]} {value}"


def value(job: Job, name: str) -> Interval:
    """A metric with its 95 % interval over the held-out noise."""
    low, high = job.metrics["intervals"][name]
    return Interval(job.metrics[name], math.nan, low, high)


def told(job: Job, name: str) -> str:
    """A metric with its interval; of several sets of samples their minimum, EDM's convention, and their mean too."""
    found, shown = job.metrics.get("over_seeds", {}).get(name), show(value(job, name), name)
    if found is None:
        return shown
    least = f"min {show(Interval(found['min'], math.nan, math.nan, math.nan), name)}, " if "min" in found else ""
    return f"{shown} ({least}mean {show(Interval(found['mean'], math.nan, math.nan, math.nan), name)})"


def markdown(jobs: Sequence[Job]) -> str:
    """One table a distance: rows by combinations of what else was varied."""
    made, first = layout(jobs), jobs[0].metrics
    what = "± half of the 95 % interval over the held-out noise; lower is better."
    lines = [f"N = {first['num_images']:,} samples a cell, real against real {against_itself(first['floor'])}; {what}"]
    for name in distances(first["distance"], first["intervals"]):
        rows = [
            "| " + " | ".join([row, *(told(found[v], name) if v in found else "" for v in made.values)]) + " |"
            for row, found in series(jobs, made).items()
        ]
        lines += ["", f"## {name}", "", *header(column_titles(made)), *rows]
    if any(job.metrics["network_calls"] != job.metrics["nfe"] for job in jobs):
        lines += [
            "",
            "## Network calls a sample: guidance calls two networks",
            "",
            *header(column_titles(made)),
            *calls(jobs, made),
        ]
    if any("over_seeds" in job.metrics for job in jobs):
        lines += [
            "",
            "Of several sets of samples the first with its interval, then minimum and mean; table.json has all.",
        ]
    return "\n".join([*lines, ""])


def column_titles(made: Layout) -> list[str]:
    """What stands above the columns."""
    return [f"{v} NFE" if made.columns == "nfe" else row_word(made.columns, v) for v in made.values]


def calls(jobs: Sequence[Job], made: Layout) -> list[str]:
    """Calls of networks, a row a combination."""
    return [
        "| " + " | ".join([row, *(f"{found[v].metrics['network_calls']:g}" if v in found else "" for v in made.values)]) + " |"
        for row, found in series(jobs, made).items()
    ]


def distinct(rows: dict[str, dict[str, Job]], name: str) -> dict[str, dict[str, Job]]:
    """The rows of a metric, those whose values all agree as one, called `A = B`: one line would hide the other."""
    found: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for label, jobs in rows.items():
        found.setdefault(tuple(sorted((at, job.metrics[name]) for at, job in jobs.items())), []).append(label)
    return {" = ".join(labels): rows[labels[0]] for labels in found.values()}


def style(number: int, total: int) -> dict[str, Any]:
    """How a line is drawn: later ones are thinner, dashed and with smaller marks, so that those below show where they meet."""
    share = (total - number) / total
    return {
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
        "linewidth": 0.8 + 1.8 * share**2,
        "markersize": 2.5 + 5 * share**2,
        "zorder": 2 + number / total,
    }


def plot(jobs: Sequence[Job], made: Layout, kind: str, path: Path) -> None:
    """The primary distance along the columns, one line a row, with intervals; logarithmic over a wide range."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = jobs[0].metrics
    figure, name = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained"), primary(first["distance"], first["intervals"])
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numeric = all(is_number(v) for v in made.values)
    lines = distinct(series(jobs, made), name)
    for number, (label, found) in enumerate(lines.items()):
        at = [v for v in made.values if v in found]
        y = [value(found[v], name) for v in at]
        x, errors = [float(v) for v in at] if numeric else at, ([v.value - v.low for v in y], [v.high - v.value for v in y])
        axes.errorbar(x, [v.value for v in y], errors, elinewidth=1, label=label, **style(number, len(lines)))
    axes.set(xlabel="calls of the velocity a sample (NFE)" if made.columns == "nfe" else made.columns, ylabel=name)
    shown = [job.metrics[name] for job in jobs]
    if min(shown) > 0 and max(shown) > 4 * min(shown):
        axes.set_yscale("log")
    if made.columns == "nfe":
        axes.set_xscale("log")
        axes.set_xticks([float(v) for v in made.values], made.values)
        axes.minorticks_off()
    if len(series(jobs, made)) > 1:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "reflow_lab"}):  # the same bytes each time
        figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
