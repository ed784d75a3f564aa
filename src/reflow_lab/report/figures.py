"""The figures of a study: bars with intervals, quality against cost, paths, curves over t."""

import math
from collections.abc import Callable, Iterable, Sequence

from ..evaluation.values import Z95
from .loaded import Entry, Loaded
from .svg import Panel, Scale, mark, number, spanning, style, tag, text

BAR = 9  #: pixels
LINE = 54  #: characters that surely fit on a line of a panel


def shown(entry: Entry, sign: bool = False) -> tuple[str, str]:
    """A value and its interval in words, in two digits of the interval's half width; "" where there is none."""
    low, high = entry["low"], entry["high"]
    half = (high - low) / 2 if low is not None and high is not None else 0
    digits = decimals(half or abs(entry["value"]) / 100)
    value = rounded(entry["value"], digits, "+" if sign else "")
    return value, f"[{rounded(low, digits)}, {rounded(high, digits)}]" if half else ""


def rounded(value: float, digits: int, sign: str = "") -> str:
    """A number with so many digits after the point; a zero has no sign."""
    return f"{round(value, digits) + 0.0:{sign if round(value, digits) else ''},.{digits}f}".replace("-", "−")


def decimals(size: float) -> int:
    """How many digits after the point show two of a number of this size; at most six."""
    return min(6, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 0


def bars(
    panel: Panel, entries: Sequence[Entry], colours: Sequence[int], dots: Sequence[Sequence[float]], unit: str = ""
) -> Panel:
    """Horizontal bars from zero with intervals; above each what it is. An entry has label, words, value, low, high."""
    above = 18 if all(len(f"{e['label']}  {e['words']}") <= LINE for e in entries) else 33  # one line of words or two
    row = above + 22
    panel.height, panel.left = row * len(entries) + 26, 6
    ends = [v for e in entries for v in (e["value"], e["low"], e["high"]) if v is not None]
    x = spanning([*ends, *(v for row in dots for v in row)], panel.left, panel.width - 6, log=False, zero=True)
    for tick in x.ticks(4):
        panel.line((x(tick), 4), (x(tick), panel.height - 20), class_="grid" if tick else "zero")
        words = number(tick) + unit
        half = 3.6 * len(words)  # about: what stands at the edge grows inwards
        anchor = "start" if x(tick) < half else "end" if x(tick) > panel.width - half else "middle"
        panel.parts.append(text(x(tick), panel.height - 6, words, text_anchor=anchor))
    for i, (entry, colour) in enumerate(zip(entries, colours, strict=True)):
        name(panel, i * row + 16, i * row + above - 2, entry)
        bar(panel, x, i * row + above + 10, entry, colour)
        panel.parts += [tag("circle", cx=x(v), cy=float(i * row + above + 10), r=2.5, class_="seed") for v in dots[i]]
    return panel


def name(panel: Panel, first: float, last: float, entry: Entry) -> None:
    """What a bar is, on the left, and its value, on the right: on one line, or on two."""
    label = entry["label"] if len(entry["label"]) <= LINE else entry["label"][: LINE - 1] + "…"
    panel.parts.append(text(panel.left, first, label, class_="strong"))
    panel.parts.append(text(panel.width - 6, last, entry["words"], text_anchor="end"))


def bar(panel: Panel, x: Scale, middle: float, entry: Entry, colour: int) -> None:
    """One bar and its interval."""
    left, right = sorted((x(0), x(entry["value"])))
    box = tag("rect", x=left, y=middle - BAR / 2, width=max(right - left, 0.5), height=float(BAR), fill="var(--c)")
    panel.group([box], class_=style(colour)[0])
    if entry["low"] is not None and entry["high"] is not None:
        whisker(panel, x(entry["low"]), x(entry["high"]), middle)


def whisker(panel: Panel, left: float, right: float, y: float) -> None:
    """An interval with caps."""
    caps = "".join(f"M{x:.1f},{y - 3:.1f}V{y + 3:.1f}" for x in (left, right))
    panel.parts.append(tag("path", d=f"M{left:.1f},{y:.1f}L{right:.1f},{y:.1f}{caps}", class_="error"))


def ladder(result: Loaded, nfe: int) -> Panel:
    """The rows' values of the primary metric at a number of steps."""
    found = [(i, result.estimate(name, nfe, result.metric)) for i, name in enumerate(result.names)]
    known = [(i, entry) for i, entry in found if entry is not None]
    entries = [entry | {"label": entry["name"], "words": " ".join(shown(entry))} for _, entry in known]
    alt = f"{result.metric} at {nfe} NFE: " + "; ".join(f"{e['label']} {e['words']}" for e in entries)
    return bars(Panel(f"{nfe} NFE", alt), entries, [i for i, _ in known], [()] * len(known))


def effects(result: Loaded, nfe: int) -> Panel:
    """The rows' effects at a number of steps: bars in per cent of the row they are measured against, words in the metric."""
    found = result.effects(nfe, result.metric)
    scales = {e["name"]: reference(result, e) for e in found}
    is_share = all(scale > 0 for scale in scales.values())
    by = {name: 100 / scale if is_share else 1 for name, scale in scales.items()}
    entries = [effect(e, by[e["name"]]) for e in found]
    seeds = [[by[e["name"]] * v for v in result.seed_differences(e["name"], e["against"], nfe, result.metric)] for e in found]
    alt = f"Effects on {result.metric} at {nfe} NFE: " + "; ".join(f"{e['label']} {e['words']}" for e in entries)
    colours = [result.names.index(e["name"]) for e in found]
    return bars(Panel(f"{nfe} NFE", alt), entries, colours, seeds, " %" if is_share else "")


def effect(entry: Entry, by: float) -> Entry:
    """An effect as a bar: its ends on the bars' scale, its words in the metric."""
    scaled = {key: None if entry[key] is None else by * entry[key] for key in ("value", "low", "high")}
    return scaled | {"label": f"{entry['name']} − {entry['against']}", "words": " ".join(shown(entry, sign=True))}


def reference(result: Loaded, effect: Entry) -> float:
    """The value of the row that an effect is measured against; 0 where it has none."""
    entry = result.estimate(effect["against"], effect["nfe"], effect["metric"])
    return 0.0 if entry is None else float(entry["value"])


def quality(result: Loaded, metric: str, against: str) -> Panel | None:
    """A metric against `nfe` or `ms_per_image`, one line a row; None where the cells do not say."""
    series = {name: list(places(result, name, metric, against)) for name in result.names}
    points = [point for line in series.values() for point in line]
    if not points:
        return None
    what = {"nfe": "NFE", "ms_per_image": "ms a sample"}[against]
    panel = Panel(f"{metric} against {what}", curve_alt(metric, what, series), height=300, left=52)
    x = spanning((p[0] for p in points), *panel.across, log=True)
    floor = result.cells[0]["floor"] if metric == result.doc["distance"] else None
    y = spanning([*heights([e for _, e in points]), *([] if floor is None else [floor])], *panel.upwards)
    panel.axes(x, y, (what, metric), result.nfe if against == "nfe" else None)
    if floor is not None:
        panel.line((panel.left, y(floor)), (panel.width - 10, y(floor)), class_="zero", stroke_dasharray="2 3")
        panel.parts.append(text(panel.left + 4, y(floor) - 4, "real against real"))
    for name, line in series.items():
        draw_series(panel, x, y, line, result.names.index(name))
    return panel


def heights(entries: Sequence[Entry]) -> list[float]:
    """What a vertical axis should hold: values and ends; of positive values no end so low that a logarithm stretches to it."""
    values = [e["value"] for e in entries]
    least = min(values) / 3 if min(values) > 0 else -math.inf
    return [*values, *(end for e in entries for end in (e["low"], e["high"]) if end is not None and end >= least)]


def places(result: Loaded, name: str, metric: str, against: str) -> Iterable[tuple[float, Entry]]:
    """A row's points: where it stands on the horizontal axis, and its estimate."""
    for nfe in result.nfe:
        entry = result.estimate(name, nfe, metric)
        at = nfe if against == "nfe" else result.mean(name, nfe, against)
        if entry is not None and at:
            yield at, entry


def draw_series(panel: Panel, x: Scale, y: Scale, line: Sequence[tuple[float, Entry]], index: int) -> None:
    """A row's line, intervals and marks."""
    colour, shape, dash = style(index)
    inner = Panel("", "")
    inner.curve(((x(at), y(e["value"])) for at, e in line), stroke_width=1.75, stroke_dasharray=dash)
    for at, e in line:
        if e["low"] is not None and e["high"] is not None:
            inner.line((x(at), y(e["low"])), (x(at), y(e["high"])), stroke="var(--c)", stroke_width=1.25)
        inner.parts.append(mark(shape, x(at), y(e["value"])))
    panel.group(inner.parts, class_=colour)


def curve_alt(metric: str, what: str, series: dict[str, list[tuple[float, Entry]]]) -> str:
    """The points in words, for who cannot see them."""
    rows = ("; ".join(f"{number(round(at, 3))} {what}: {shown(e)[0]}" for at, e in line) for line in series.values())
    return f"{metric} against {what}. " + ". ".join(f"{name}: {row}" for name, row in zip(series, rows, strict=True))


def flows(result: Loaded) -> list[tuple[str, int, Entry]]:
    """The flows that there are traces of, each set of weights once: names of its rows, the first one's colour, the trace."""
    found: dict[str, tuple[list[str], int, Entry]] = {}
    for index, name in enumerate(result.names):
        if name in result.traces:
            trace = result.traces[name]
            found.setdefault(trace["weights"], ([], index, trace))[0].append(name)
    return [(", ".join(names), index, trace) for names, index, trace in found.values()]


def paths(result: Loaded) -> list[Panel]:
    """The paths of every flow, on axes that all share."""
    found = flows(result)
    draw = pixels if found and found[0][2]["paths"]["kind"] == "pixels" else points
    every = [v for _, _, trace in found for key in ("value", "x", "y") for path in trace["paths"].get(key, ()) for v in path]
    return [draw(names, index, trace["paths"], every) for names, index, trace in found]


def small(names: str, alt: str) -> Panel:
    """A panel of which two stand side by side on a phone."""
    return Panel(names, alt, width=184, height=180, left=34)


def pixels(names: str, index: int, found: Entry, every: Sequence[float]) -> Panel:
    """The values of pixels over t."""
    panel = small(names, f"{names}: values of {len(found['value'])} pixels from noise, t = 1, to data, t = 0")
    x, y = Scale(0, 1, *panel.across), spanning(every, *panel.upwards, log=False)
    panel.axes(x, y, ("t", "pixel"), (0, 0.5, 1))
    inner = Panel("", "")
    for values in found["value"]:
        inner.curve(((x(t), y(v)) for t, v in zip(found["t"], values, strict=True)), stroke_width=1.1, stroke_opacity=0.85)
    panel.group(inner.parts, class_=style(index)[0])
    return panel


def points(names: str, index: int, found: Entry, every: Sequence[float]) -> Panel:
    """The ways of points in the plane: hollow where they start as noise, full where they end as data."""
    panel = small(names, f"{names}: paths of {len(found['x'])} points from noise (hollow) to data (full)")
    x, y = spanning(every, *panel.across, log=False), spanning(every, *panel.upwards, log=False)
    panel.axes(x, y, ("first coordinate", "last"), x.ticks(4))
    inner = Panel("", "")
    for path in (list(zip(*both, strict=True)) for both in zip(found["x"], found["y"], strict=True)):
        inner.curve(((x(a), y(b)) for a, b in path), stroke_width=1, stroke_opacity=0.8)
        inner.parts.append(tag("circle", cx=x(path[0][0]), cy=y(path[0][1]), r=1.5, class_="seed"))
        inner.parts.append(mark("circle", x(path[-1][0]), y(path[-1][1]), 1.8))
    panel.group(inner.parts, class_=style(index)[0])
    return panel


CURVES: dict[str, tuple[str, str, Callable[[Entry], Entry | None]]] = {
    "straightness": ("|v − chord|²", "along_time", lambda trace: trace["along_time"]["deviation"]),
    "acceleration": ("|dv/dt|", "along_time", lambda trace: trace["along_time"]["acceleration"]),
    "relative loss": ("loss / mean", "relative_loss", lambda trace: trace["relative_loss"]),
}  #: the vertical axis, which part of a trace has the times, which the means


def over_time(result: Loaded, title: str) -> Panel | None:
    """One of CURVES over t, a line a flow; None where no flow has it."""
    label, part, pick = CURVES[title]
    known = [
        (names, index, list(zip(trace[part]["t"], estimates(curve), strict=True)))
        for names, index, trace in flows(result)
        if (curve := pick(trace)) is not None
    ]
    if not known:
        return None
    rows = ", ".join(names for names, _, _ in known)
    panel = Panel(f"{title} over t", f"{title} over t, from data (0) to noise (1), of {rows}", left=56)
    x, y = Scale(0, 1, *panel.across), spanning(heights([e for _, _, line in known for _, e in line]), *panel.upwards)
    panel.axes(x, y, ("t  (0 data, 1 noise)", label), (0, 0.25, 0.5, 0.75, 1))
    for _, index, line in known:
        draw_series(panel, x, y, line, index)
    return panel


def estimates(curve: Entry) -> list[Entry]:
    """The means of a curve, with 95 % intervals where it has standard errors."""
    halves = [Z95 * error for error in curve["standard_error"]] if "standard_error" in curve else [None] * len(curve["mean"])
    return [
        {"value": v, "low": None if half is None else v - half, "high": None if half is None else v + half}
        for v, half in zip(curve["mean"], halves, strict=True)
    ]
