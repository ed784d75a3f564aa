"""Plots as inline SVG, written by hand: text stays text, colours follow the page's light or dark, and nothing is fetched."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

NUM_COLOURS = 7  #: of the page's style sheet, safe for the colour-blind
MARKS = ("circle", "square", "triangle", "diamond")
DASHES = ("", "6 3", "2 3")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number on an axis: plain between 0.001 and 99,999, else with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    factor, power = f"{value:.3e}".split("e")
    digits = f"{float(factor):g}"
    return ("" if digits == "1" else f"{digits}·") + "10" + str(int(power)).translate(SUPERSCRIPTS)


class Scale(NamedTuple):
    """From values in [low, high] to coordinates in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value; what lies outside stands at the edge."""
        low, high, at = (math.log(max(v, 1e-300)) if self.is_log else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the scale."""
        return log_ticks(self.low, self.high) if self.is_log else linear_ticks(self.low, self.high, about)


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most `about` + 1 of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + i) * step:.12g}") for i in range(count)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; within two decades also twice and five times those."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) <= 2 else (1,)
    every = max(1, len(decades) // 5)
    found = [float(f"{factor}e{power}") for power in decades[::every] for factor in factors]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def spanning(values: Iterable[float], start: float, end: float, log: bool | None = None, zero: bool = False) -> Scale:
    """A scale that holds the values with some room: logarithmic, unless told, where positive ones span a decade."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    is_log = low > 0 and high > 10 * low if log is None else log and low > 0
    if is_log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return Scale(low / room, high * room, start, end, True)
    low, high = (min(low, 0), max(high, 0)) if zero else (low, high)
    if low == high:
        return Scale(low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10, start, end)
    room = 0.06 * (high - low)
    return Scale(low if zero and low == 0 else low - room, high if zero and high == 0 else high + room, start, end)


def style(index: int) -> tuple[str, str, str]:
    """The class that colours a row, its mark and its dashes: different for the first 28 rows of a study."""
    return f"c{index % NUM_COLOURS}", MARKS[index % len(MARKS)], DASHES[index // NUM_COLOURS % len(DASHES)]


def tag(name: str, content: str | None = None, /, **attributes: object) -> str:
    """An element; `class_` is class, underscores are hyphens, floats are cut to a tenth."""
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value not in (None, ""))
    words = "".join(f' {key}="{_plain(value)}"' for key, value in given)
    return f"<{name}{words}/>" if content is None else f"<{name}{words}>{content}</{name}>"


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))


def text(x: float, y: float, words: str, **attributes: object) -> str:
    """A line of text."""
    return tag("text", escape(words), x=float(x), y=float(y), **attributes)


def mark(shape: str, x: float, y: float, size: float = 3.5) -> str:
    """A filled mark around a point."""
    if shape == "circle":
        return tag("circle", cx=float(x), cy=float(y), r=size, fill="var(--c)")
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        "diamond": ((0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)),
    }[shape]
    return tag("polygon", points=join((x + size * dx, y + size * dy) for dx, dy in corners), fill="var(--c)")


def join(points: Iterable[tuple[float, float]]) -> str:
    """Coordinates as SVG has them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def swatch(index: int) -> str:
    """A row's line and mark, for a legend."""
    colour, shape, dash = style(index)
    line = tag("path", d="M1,7H27", stroke="var(--c)", stroke_width=2, stroke_dasharray=dash)
    return tag("svg", line + mark(shape, 14, 7), class_=colour, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true")


@dataclass
class Panel:
    """One plot of `width` x `height` pixels: what is drawn is added to `parts`, in the order of painting."""

    title: str
    alt: str
    width: float = 360
    height: float = 260
    left: float = 46
    parts: list[str] = field(default_factory=list)

    @property
    def across(self) -> tuple[float, float]:
        """Where the horizontal axis begins and ends."""
        return self.left, self.width - 10

    @property
    def upwards(self) -> tuple[float, float]:
        """Where the vertical axis begins and ends."""
        return self.height - 38, 28

    def axes(self, x: Scale, y: Scale, labels: tuple[str, str], ticks: Sequence[float] | None = None) -> None:
        """Grid lines, numbers and names of the axes; `ticks` are the horizontal ones, if not those of the scale."""
        bottom, top = self.upwards
        for tick in x.ticks() if ticks is None else ticks:
            self.line((x(tick), bottom), (x(tick), top), class_="grid")
            self.parts.append(text(x(tick), bottom + 15, number(tick), text_anchor="middle"))
        for tick in y.ticks():
            self.line((self.across[0], y(tick)), (self.across[1], y(tick)), class_="grid")
            self.parts.append(text(self.left - 5, y(tick) + 4, number(tick), text_anchor="end"))
        self.parts.append(text(sum(self.across) / 2, self.height - 6, labels[0], text_anchor="middle", class_="label"))
        self.parts.append(text(4, 14, labels[1], class_="label"))

    def line(self, start: tuple[float, float], end: tuple[float, float], **attributes: object) -> None:
        """A straight line between two points of the picture."""
        (x1, y1), (x2, y2) = start, end
        self.parts.append(tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes))

    def curve(self, points: Iterable[tuple[float, float]], **attributes: object) -> None:
        """A line through points of the picture."""
        self.parts.append(tag("polyline", points=join(points), fill="none", stroke="var(--c)", **attributes))

    def group(self, parts: Sequence[str], **attributes: object) -> None:
        """Several elements with common attributes."""
        self.parts.append(tag("g", "".join(parts), **attributes))

    def html(self) -> str:
        """The picture under its title."""
        box = f"0 0 {self.width:g} {self.height:g}"
        title = tag("p", escape(self.title), class_="panel-title") if self.title else ""
        picture = tag("svg", "".join(self.parts), viewBox=box, role="img", aria_label=self.alt)
        return tag("div", title + picture, class_="panel", style=f"max-width:{max(240, self.width * 1.2):g}px")
