"""A study's result as Markdown and LaTeX: values with intervals, the paper's numbers, effects, costs, commands."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifacts import write_atomically
from ..evaluation.intervals import Interval
from .results import Cell, Result, of

DIGITS = {"fd_lite0": 1, "fd_inception": 2, "fid": 2}  #: after the point, by the metric's name
UNKNOWN = "n/a"
SPECIAL = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


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
        lines += ["", f"## {name}: {meaning(name, cells)}", "", *grid(result, name)]
        if name == result["metric"] and result["effects"]:
            title = f"## Effect of each row on {name} (its value minus that of the row it is measured against)"
            lines += ["", title, "", *effect_lines(result, name)]
    title = "## Straightness of the flow, and what sampling and training cost"
    lines += ["", title, "", *costs(result), "", devices(cells), ""]
    lines += ["## Samplers", "", *samplers(result), ""]
    lines += ["## Commands", "", f"    {result['command']}", ""]
    return "\n".join([*lines, *(f"- {row['name']}: `{row['command']}`" for row in result["rows"]), ""])


def meaning(metric: str, cells: Sequence[Cell]) -> str:
    """What a metric is, for a heading."""
    if metric == "paired_rmse":
        return "to the teacher's image of the same noise (rewards blur: a diagnostic)"
    if metric.endswith("_teacher"):
        return "distance to the teacher's many-step samples of the same noise"
    if metric.endswith("_added"):
        return "distance to the data beyond that of the teacher's many-step samples"
    return f"distance to the data (real against real: {against_itself(cells[0]['floor'])})"


def against_itself(floor: float | None) -> str:
    """The distance of real samples to others; n/a where a data set has none to spare."""
    return UNKNOWN if floor is None else f"{floor:.4g}"


def heading(result: Result) -> str:
    """What the numbers below are: how many images and seeds, which intervals."""
    num, seeds = result["cells"][0]["num_images"], result["seeds"]
    noise = "the held-out noise (bootstrap); one training seed"
    over = f"{len(seeds)} training seeds (Student's t)" if len(seeds) > 1 else noise
    lines = (
        f"N = {num:,} samples a cell; training seeds {', '.join(map(str, seeds))}; 95 % intervals over {over}.",
        "All rows are measured on the same held-out noise, and against the same teacher where there is one. Lower is better.",
    )
    return " ".join(lines)


def header(columns: Sequence[object]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]


def line(*entries: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(entries) + " |"


def show(value: Interval, metric: str, sign: str = "") -> str:
    """value ± half of the 95 % interval where there is one, in digits that suit the size of the metric."""
    half, digits = (value.high - value.low) / 2, next((n for name, n in DIGITS.items() if metric.startswith(name)), 4)
    return f"{value.value:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def found(entries: Sequence[dict[str, Any]], name: str, nfe: int, metric: str) -> Interval:
    """An entry of a result's estimates or effects."""
    entry = next(e for e in entries if (e["name"], e["nfe"], e["metric"]) == (name, nfe, metric))
    low, high = (math.nan if entry[end] is None else entry[end] for end in ("low", "high"))
    return Interval(entry["value"], math.nan, low, high)


def values(result: Result, row: dict[str, Any], metric: str) -> list[str]:
    """A row's values of a metric by numbers of steps."""
    return [show(found(result["estimates"], row["name"], nfe, metric), metric) for nfe in result["nfe"]]


def grid(result: Result, metric: str) -> list[str]:
    """Rows by numbers of steps; beside the distance to the data the paper's numbers, which are of other features and sizes."""
    beside = result["paper"] is not None and metric == result["distance"]
    columns = [*(f"{nfe} NFE" for nfe in result["nfe"]), *([f"the paper: {result['paper']}"] if beside else [])]
    return [
        *header(columns),
        *(line(r["name"], *values(result, r, metric), *([papers(r)] if beside else [])) for r in result["rows"]),
    ]


def papers(row: dict[str, Any]) -> str:
    """The paper's number of a row with the tag of its source; n/a where it is unknown."""
    return UNKNOWN if row["paper"] is None else f"{row['paper']['value']} [{row['paper']['source']}]"


def effect_lines(result: Result, metric: str) -> list[str]:
    """The effect of every row that names another one."""
    rows = [row for row in result["rows"] if row["against"]]
    shown = [[show(found(result["effects"], row["name"], nfe, metric), metric, "+") for nfe in result["nfe"]] for row in rows]
    named = [f"{row['name']} against {row['against']}" for row in rows]
    return [
        *header([f"{nfe} NFE" for nfe in result["nfe"]]),
        *(line(name, *entries) for name, entries in zip(named, shown, strict=True)),
    ]


def costs(result: Result) -> list[str]:
    """Straightness and training once a row, milliseconds per image by steps, the most memory of all steps."""
    times = [f"ms at {nfe} NFE" for nfe in result["nfe"]]
    lines = header(["straightness", *times, "memory MB", "trained on kimg", "in seconds"])
    for row in result["rows"]:
        at = [of(result["cells"], row["name"], nfe) for nfe in result["nfe"]]
        ms = [f"{mean([c['ms_per_image'] for c in cells]):.2f}" for cells in at]
        memory = max(c["peak_memory_mb"] for cells in at for c in cells)
        training = [shown([c["training"][key] for c in at[0]]) for key in ("kimg", "seconds")]
        straight = f"{mean([c['straightness'] for c in at[0]]):.4f}"
        lines.append(line(row["name"], straight, *ms, f"{memory:.0f}", *training))
    return lines


def samplers(result: Result) -> list[str]:
    """Solver and grid by rows and numbers of steps: with `inf=auto` those that were found, which may differ between seeds."""

    def used(name: str, nfe: int) -> str:
        return "; ".join(sorted({cell["sampler"] for cell in of(result["cells"], name, nfe)}))

    rows = [[row["name"], *(used(row["name"], nfe) for nfe in result["nfe"])] for row in result["rows"]]
    return [*header([f"{nfe} NFE" for nfe in result["nfe"]]), *(line(*row) for row in rows)]


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
    """The primary metric as a table for a paper (booktabs): rows by numbers of steps, the paper's numbers last."""
    metric, columns = result["metric"], [f"{nfe} NFE" for nfe in result["nfe"]]
    beside = result["paper"] is not None
    rows = [[row["name"], *values(result, row, metric), *([papers(row)] if beside else [])] for row in result["rows"]]
    titles = ["", *columns, *(["paper"] if beside else [])]
    body = [" & ".join(tex(entry) for entry in row) + r" \\" for row in rows]
    caption = tex(f"{result['title']}. {metric}: {meaning(metric, result['cells'])}. {heading(result)}")
    if beside:
        caption += tex(f" Paper: {result['paper']}.")
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
            r"\toprule",
            " & ".join(tex(title) for title in titles) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def tex(text: str) -> str:
    """Text with what LaTeX reads as its own escaped."""
    return "".join(SPECIAL.get(character, character) for character in text).replace("±", r"$\pm$")
