"""A study's result as Markdown and LaTeX: values with intervals, the paper's numbers, effects, costs, commands."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts import write_atomically
from ..evaluation.values import ADDED, PAIRED, TEACHER, Interval, plus_minus
from .results import Cell, Result, of

DIGITS = {"fd_lite0": 1, "fd_inception": 2, "fid": 2}  #: after the point, by the metric's name
UNKNOWN = "n/a"
KERNEL = "kernel distance to the data"
SCORES = {
    "kid": KERNEL,
    "precision": "share of samples within the data's manifold; higher is better",
    "recall": "share of the data within the samples' manifold; higher is better",
    "inception_score": "higher is better",
}
SPECIAL = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


class Grid(NamedTuple):
    """A table: titles of the columns, and rows, the name first."""

    columns: list[str]
    rows: list[list[str]]

    def lines(self) -> list[str]:
        """As Markdown."""
        return [*header(self.columns), *("| " + " | ".join(row) + " |" for row in self.rows)]

    def latex(self, caption: str) -> list[str]:
        """As a table of booktabs."""
        body = [" & ".join(map(tex, row)) + r" \\" for row in (["", *self.columns], *self.rows)]
        begin = [
            r"\begin{table}",
            rf"\caption{{{tex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
            r"\toprule",
        ]
        return [*begin, body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]


def write(out: Path, result: Result) -> str:
    """Write table.md and table.tex; returns the Markdown."""
    text, tex = markdown(result), latex(result)
    write_atomically(out / "table.md", lambda p: p.write_text(text))
    write_atomically(out / "table.tex", lambda p: p.write_text(tex))
    return text


def markdown(result: Result) -> str:
    """The whole page: distances, effects, the other columns. Without a teacher the distance to the data stands first."""
    cells = result["cells"]
    lines = [f"# {result['title']}", "", heading(result)]
    for name in result["metrics"]:
        lines += ["", f"## {name}: {meaning(name, cells)}", "", *grid(result, name).lines()]
        if name == result["metric"] and result["effects"]:
            title = f"## Effect of each row on {name} (its value minus that of the row it is measured against)"
            lines += ["", title, "", *effects(result, name).lines()]
    title = "## Straightness of the flow, and what sampling and training cost"
    lines += ["", title, "", *costs(result).lines(), "", devices(cells), ""]
    lines += ["## Samplers", "", *samplers(result).lines(), ""]
    lines += ["## Commands", "", f"    {result['command']}", ""]
    return "\n".join([*lines, *(f"- {row['name']}: `{row['command']}`" for row in result["rows"]), ""])


def meaning(metric: str, cells: Sequence[Cell]) -> str:
    """What a metric is, for a heading."""
    if metric == PAIRED:
        return "to the teacher's image of the same noise (rewards blur: a diagnostic)"
    if metric.endswith(TEACHER):
        return "distance to the teacher's many-step samples of the same noise"
    if metric.endswith(ADDED):
        return "distance to the data beyond that of the teacher's many-step samples"
    if metric in SCORES or metric.startswith("kd_"):
        return SCORES.get(metric, KERNEL)
    return f"distance to the data (real against real: {against_itself(cells[0]['floor'])})"


def against_itself(floor: float | None) -> str:
    """The distance of real samples to others; n/a where a data set has none to spare."""
    return UNKNOWN if floor is None else f"{floor:.4g}"


def heading(result: Result) -> str:
    """What the numbers below are: how many images and seeds, which intervals."""
    num, seeds = result["cells"][0]["num_images"], result["seeds"]
    noise = "the held-out noise (bootstrap); one training seed"
    several = (
        f"{len(seeds)} training seeds (Student's t), which share one store of pairs; where nothing is trained, over the noise"
    )
    over = several if len(seeds) > 1 else noise
    lines = (
        f"N = {num:,} samples a cell; training seeds {', '.join(map(str, seeds))}; 95 % intervals over {over}.",
        "All rows are measured on the same held-out noise, and against the same teacher where there is one. Lower is better.",
    )
    failed = [f"{found['name']} seed {found['seed']}: {found['error']}" for found in result.get("failed", [])]
    return " ".join([*lines, *([f"Not in the table, since they failed: {'; '.join(failed)}."] if failed else [])])


def header(columns: Sequence[object]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]


def show(value: Interval, metric: str, sign: str = "") -> str:
    """value ± half of the 95 % interval where there is one, in digits that suit the size of the metric."""
    digits = next((n for name, n in DIGITS.items() if metric.startswith(name)), 4)
    return plus_minus(value.value, (value.high - value.low) / 2, digits, sign)


def found(entries: Sequence[dict[str, Any]], name: str, nfe: int, metric: str) -> Interval:
    """An entry of a result's estimates or effects."""
    entry = next(e for e in entries if (e["name"], e["nfe"], e["metric"]) == (name, nfe, metric))
    low, high = (math.nan if entry[end] is None else entry[end] for end in ("low", "high"))
    return Interval(entry["value"], math.nan, low, high)


def values(result: Result, row: dict[str, Any], metric: str) -> list[str]:
    """A row's values of a metric by numbers of steps."""
    return [show(found(result["estimates"], row["name"], nfe, metric), metric) for nfe in result["nfe"]]


def grid(result: Result, metric: str) -> Grid:
    """Rows by numbers of steps; beside the distance to the data the paper's numbers, which are of other features and sizes."""
    beside = result["paper"] is not None and metric == result["distance"]
    columns = [*steps(result), *([f"the paper: {result['paper']}"] if beside else [])]
    return Grid(columns, [[r["name"], *values(result, r, metric), *([papers(r)] if beside else [])] for r in result["rows"]])


def steps(result: Result) -> list[str]:
    """Titles of columns by numbers of steps."""
    return [f"{nfe} NFE" for nfe in result["nfe"]]


def papers(row: dict[str, Any]) -> str:
    """The paper's number of a row with the tag of its source; n/a where it is unknown."""
    return UNKNOWN if row["paper"] is None else f"{row['paper']['value']} [{row['paper']['source']}]"


def effects(result: Result, metric: str) -> Grid:
    """The effect of every row that names another one."""
    rows = [row for row in result["rows"] if row["against"]]
    shown = [[show(found(result["effects"], row["name"], nfe, metric), metric, "+") for nfe in result["nfe"]] for row in rows]
    named = [f"{row['name']} against {row['against']}" for row in rows]
    return Grid(steps(result), [[name, *entries] for name, entries in zip(named, shown, strict=True)])


def costs(result: Result) -> Grid:
    """Straightness and training once a row, milliseconds per image by steps, the most memory of all steps."""
    rows = []
    for row in result["rows"]:
        at = [of(result["cells"], row["name"], nfe) for nfe in result["nfe"]]
        ms = [f"{mean([c['ms_per_image'] for c in cells]):.2f}" for cells in at]
        memory = max(c["peak_memory_mb"] for cells in at for c in cells)
        training = [shown([c["training"][key] for c in at[0]]) for key in ("kimg", "seconds")]
        rows.append([row["name"], f"{mean([c['straightness'] for c in at[0]]):.4f}", *ms, f"{memory:.0f}", *training])
    times = [f"ms at {nfe} NFE" for nfe in result["nfe"]]
    return Grid(["straightness", *times, "memory MB", "trained on kimg", "in seconds"], rows)


def samplers(result: Result) -> Grid:
    """Solver and grid by rows and numbers of steps: with `inf=auto` those that were found, which may differ between seeds."""

    def used(name: str, nfe: int) -> str:
        return "; ".join(sorted({cell["sampler"] for cell in of(result["cells"], name, nfe)}))

    return Grid(steps(result), [[row["name"], *(used(row["name"], nfe) for nfe in result["nfe"])] for row in result["rows"]])


def mean(numbers: Sequence[float]) -> float:
    """The mean over seeds."""
    return sum(numbers) / len(numbers)


def shown(numbers: Sequence[float | None]) -> str:
    """The mean of a training's cost over seeds; a dash where a run of an older version did not note it."""
    known = [number for number in numbers if number is not None]
    return f"{mean(known):.0f}" if len(known) == len(numbers) else "–"


def devices(cells: Sequence[Cell]) -> str:
    """Where times and memory were measured, and what they are of."""
    sampling, training = {c["device"] for c in cells}, {c["training"]["device"] for c in cells} - {None}
    where = f"Sampling on {', '.join(sorted(sampling))}; training on {', '.join(sorted(training)) or 'a device not noted'}."
    return f"{where} Memory: weights, and live tensors of a batch. Seconds: of training alone, pairs are drawn apart."


def latex(result: Result) -> str:
    """Tables for a paper: the primary metric and the distance to the data, the effects, the costs."""
    about, cells = f"{result['title']}. {{}}. {heading(result)}", result["cells"]
    lines = []
    for metric in dict.fromkeys((result["metric"], result["distance"])):
        lines += grid(result, metric).latex(about.format(f"{metric}: {meaning(metric, cells)}"))
    if result["effects"]:
        lines += effects(result, result["metric"]).latex(about.format(f"Effect of each row on {result['metric']}"))
    return "\n".join([*lines, *costs(result).latex(f"{result['title']}. {devices(cells)}"), ""])


def tex(text: str) -> str:
    """Text with what LaTeX reads as its own escaped."""
    return "".join(SPECIAL.get(character, character) for character in text).replace("±", r"$\pm$")
