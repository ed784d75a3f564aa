"""The tables of a study as HTML: values with intervals, effects, costs, samplers."""

from collections.abc import Sequence
from html import escape

from ..studies import table
from .figures import decimals, shown
from .loaded import Entry, Loaded
from .svg import tag

NONE = "–"


def number(entry: Entry | None, sign: bool = False, is_best: bool = False) -> str:
    """A cell: the value, and below it the interval."""
    if entry is None:
        return tag("td", NONE)
    value, ends = shown(entry, sign)
    return tag("td", value + (tag("small", ends) if ends else ""), class_="best" if is_best else None)


def plain(value: float | None, digits: int) -> str:
    """A cell with a number that has no interval."""
    return tag("td", NONE if value is None else f"{value:,.{digits}f}")


def words(text: str) -> str:
    """A cell with words."""
    return tag("td", escape(text), class_="words")


def made(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table in a box of its own that scrolls sideways where the page is narrow; rows are a name and cells."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("", *columns))
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>\n' for name, cells in rows)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{inner}</div>'
    return f'<p class="caption">{escape(caption)}</p>{box}'


def steps(result: Loaded) -> list[str]:
    """The columns of most tables."""
    return [f"{nfe} NFE" for nfe in result.nfe]


def values(result: Loaded, metric: str) -> str:
    """A metric's values; the lowest of the primary one in bold, beside the distance to the data the paper's numbers."""
    least = {nfe: lowest(result, nfe) if metric == result.metric else None for nfe in result.nfe}
    beside = result.doc["paper"] is not None and metric == result.doc["distance"]

    def cells(row: Entry) -> list[str]:
        found = [(nfe, result.estimate(row["name"], nfe, metric)) for nfe in result.nfe]
        mine = [number(entry, is_best=entry is not None and entry["value"] == least[nfe]) for nfe, entry in found]
        return [*mine, *([words(table.papers(row))] if beside else [])]

    columns = [*steps(result), *([f"the paper: {result.doc['paper']}"] if beside else [])]
    caption = f"{metric}: {table.meaning(metric, result.cells)}."
    return made(caption, columns, [(row["name"], cells(row)) for row in result.doc["rows"]])


def lowest(result: Loaded, nfe: int) -> float | None:
    """The lowest value of the primary metric at a number of steps."""
    found = [result.estimate(name, nfe, result.metric) for name in result.names]
    return min((entry["value"] for entry in found if entry is not None), default=None)


def effects(result: Loaded) -> str:
    """The effects on the primary metric."""
    found = {(e["name"], nfe): e for nfe in result.nfe for e in result.effects(nfe, result.metric)}
    names = dict.fromkeys((e["name"], e["against"]) for e in found.values())
    rows = [(f"{a} − {b}", [number(found.get((a, nfe)), sign=True) for nfe in result.nfe]) for a, b in names]
    return made(f"Change of {result.metric}, with its 95 % interval; below zero is better.", steps(result), rows)


def costs(result: Loaded) -> str:
    """What a row cost to train and to sample, and how straight its flow is."""

    def cells(name: str) -> list[str]:
        first, ms = result.nfe[0], [result.mean(name, nfe, "ms_per_image") for nfe in result.nfe]
        training = [result.training(name, key) for key in ("kimg", "seconds")]
        memory = [result.mean(name, nfe, "peak_memory_mb") for nfe in result.nfe]
        most = max((m for m in memory if m is not None), default=None)
        straight = plain(result.mean(name, first, "straightness"), 4)
        return [
            *(plain(v, 0) for v in training),
            straight,
            *(plain(v, decimals(v or 0)) for v in ms),
            plain(most, 0 if (most or 0) >= 10 else 2),
        ]

    columns = ["trained on kimg", "in seconds", "straightness", *(f"ms at {nfe} NFE" for nfe in result.nfe), "memory MB"]
    caption = "Costs, means over seeds: milliseconds a sample, memory of a batch; a straight flow has the straightness 0."
    return made(caption, columns, [(name, cells(name)) for name in result.names])


def samplers(result: Loaded) -> str:
    """Solver and grid of each row and number of steps, which with `inf=auto` may differ between seeds; "" if none is noted."""
    if all(cell["sampler"] is None for cell in result.cells):
        return ""

    def used(name: str, nfe: int) -> str:
        return words("; ".join(sorted({cell["sampler"] or NONE for cell in result.at(name, nfe)})))

    rows = [(name, [used(name, nfe) for nfe in result.nfe]) for name in result.names]
    return made("Samplers: the solver and its grid of times.", steps(result), rows)
