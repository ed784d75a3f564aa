"""The verb `report`: the results of studies as one HTML page that needs no network and no script."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

import reflow_lab

from ..arguments import Parser
from ..artifacts import write_atomically
from ..errors import UserError, require
from ..studies import results, table
from . import figures, loaded, tables
from .loaded import Loaded
from .svg import Panel, swatch

FOLDERS = ("experiments/results", "outputs")  #: where results are looked for if none are named
WIDEST = 1600  #: pixels of a picture of samples
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  #: by which a browser fetches and runs nothing
INTRODUCTION = (
    "Each study is a set of trained flows, its rows, measured at several numbers of steps. NFE is the number of calls of the "
    "velocity a sample. Time runs from t = 0, data, to t = 1, noise. Distances are Fréchet distances in the features that their "
    "names say; they depend on the number of samples, so compare within a study only. Lower is better. Intervals are of 95 %."
)


def main(argv: Sequence[str]) -> None:
    """Write the report of the folders that are named, or of all results that there are."""
    parser = Parser(prog="reflow-lab report", description="Results of studies as one HTML page.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="with a table.json; default: all that there are")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default report.html)")
    args = parser.parse_args(argv)
    require(not args.out.is_dir(), "--out", args.out, "is a folder; give the name of a file")
    found: dict[str, Loaded] = {}
    for folder in named(args.folders) or present():
        result = loaded.read(folder)
        found.setdefault(result.doc["sha256"], result)  # a copy is told once
    text = page(list(found.values()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"written: {args.out} ({len(found)} {'study' if len(found) == 1 else 'studies'}, {len(text.encode()) / 1e6:.1f} MB)")


def named(folders: Sequence[Path]) -> list[Path]:
    """The folders, each of which must hold a result."""
    for folder in folders:
        require((folder / "table.json").is_file(), "FOLDER", folder, "has no table.json: it is not the folder of a study")
    return list(folders)


def present() -> list[Path]:
    """Every folder with a study's result below FOLDERS."""
    found = [folder for root in FOLDERS for folder in results.found(Path(root))]
    if not found:
        raise UserError(f"no table.json below {' or '.join(FOLDERS)}: run a study first, e.g. `make demo`, or name its folder")
    return found


def page(found: Sequence[Loaded]) -> str:
    """The whole page."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    keys = unique([slug(result.doc["study"]) for result in found])
    sections = [study(result, key) for result, key in zip(found, keys, strict=True)]
    body = [
        "<header><h1>Measured: flows of few steps</h1>",
        f"<p>{escape(INTRODUCTION)}</p></header>",
        contents(found, keys),
        "<main>",
        *sections,
        "</main>",
        f'<footer><p class="note">Made by reflow_lab {escape(reflow_lab.__version__)}, `reflow-lab report`.</p></footer>',
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>reflow_lab: results</title>\n<style>\n{style}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def slug(name: str) -> str:
    """A name as an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "study"


def unique(names: Sequence[str]) -> list[str]:
    """The names, those that were there before with a number."""
    return [name if (before := names[:i].count(name)) == 0 else f"{name}-{before + 1}" for i, name in enumerate(names)]


def contents(found: Sequence[Loaded], keys: Sequence[str]) -> str:
    """The table of contents."""

    def entry(result: Loaded, key: str) -> str:
        links = " ".join(f'<a href="#{key}-{slug(title)}">{title.lower()}</a>' for title, _ in parts_of(result))
        num = len(result.doc["seeds"])
        what = f"{result.doc['data']}, {len(result.names)} rows, {num} seed{'s' if num > 1 else ''}"
        title = f'<a href="#{key}">{escape(result.title)}</a> <small>{escape(what)}</small>'
        return f'<li>{title}<span class="parts">{links}</span></li>'

    listed = "\n".join(entry(result, key) for result, key in zip(found, keys, strict=True))
    return f'<nav aria-label="Contents"><h2 id="contents">Contents</h2>\n<ul>\n{listed}\n</ul></nav>'


def study(result: Loaded, key: str) -> str:
    """The section of a study."""
    parts = [
        f'<section>\n<h3 id="{key}-{slug(title)}">{title}</h3>\n{make(result)}\n</section>' for title, make in parts_of(result)
    ]
    where = f"{result.doc['study']}, from {result.folder}/table.json, measured with reflow_lab {result.doc['code']}."
    lines = (escape(table.heading(result.doc)), f'<span class="note">{escape(where)}</span>')
    heading = f'<h2 id="{key}">{escape(result.title)}</h2>\n' + "\n".join(f"<p>{line}</p>" for line in lines)
    return f'<article aria-labelledby="{key}">\n{heading}\n' + "\n".join(parts) + "\n</article>"


def parts_of(result: Loaded) -> list[tuple[str, Callable[[Loaded], str]]]:
    """The parts that a study has, by title: what was not measured is left out."""
    wanted = (
        ("Values", values, True),
        ("Effects", effects, bool(result.doc["effects"])),
        ("Quality and cost", quality, True),
        ("Samples", samples, result.samples is not None),
        ("Paths", paths, bool(figures.flows(result))),
        ("Over time", over_time, bool(figures.flows(result))),
        ("Protocol", protocol, True),
        ("Commands", commands, True),
    )
    return [(title, make) for title, make, is_there in wanted if is_there]


def figure(panels: Sequence[Panel | None], caption: str, kind: str = "panels", above: str = "") -> str:
    """Panels side by side where there is room, and what they show."""
    drawn = "\n".join(panel.html() for panel in panels if panel is not None)
    return f'<figure>{above}<div class="{kind}">\n{drawn}\n</div><figcaption>{escape(caption)}</figcaption></figure>'


def legend(result: Loaded) -> str:
    """The rows' lines and marks."""
    rows = "".join(f"<li>{swatch(i)}{escape(name)}</li>" for i, name in enumerate(result.names))
    return f'<ul class="legend">{rows}</ul>'


def about(result: Loaded) -> str:
    """What a caption says of the numbers: N, seeds, intervals."""
    return table.heading(result.doc).split(". ")[0] + "."


def values(result: Loaded) -> str:
    """The values of every metric, those of the primary one as bars too."""
    others = "".join(tables.values(result, metric) for metric in result.doc["metrics"] if metric != result.metric)
    caption = f"{result.metric} with its interval, one plot a number of steps, each on its own scale. {about(result)}"
    bars = figure([figures.ladder(result, nfe) for nfe in result.nfe], caption)
    first = f"{tables.values(result, result.metric)}<p class='note'>Bold: the lowest of a column.</p>"
    return first + bars + (f"<h4>Other measures</h4>{others}" if others else "")


def effects(result: Loaded) -> str:
    """What each row changes, against the row that it is measured against."""
    several = " Small circles: the seeds." if len(result.doc["seeds"]) > 1 else ""
    caption = (
        f"Change of {result.metric}: bar and interval in per cent of the row that it is measured against, beside it "
        f"the difference itself. Left of zero is better; an interval with zero in it leaves that open.{several} {about(result)}"
    )
    return tables.effects(result) + figure([figures.effects(result, nfe) for nfe in result.nfe], caption)


def quality(result: Loaded) -> str:
    """The primary metric and the distance to the data against NFE and milliseconds, and what all rows cost."""
    metrics = dict.fromkeys((result.metric, result.doc["distance"]))
    kinds = ("nfe", "ms_per_image")
    panels = [figures.quality(result, metric, kind) for metric in metrics for kind in kinds]
    what = (
        "Quality against the number of calls of the velocity and against the time that a sample takes. Axes are logarithmic "
        "where values span a decade; an interval that goes lower than they do ends at the edge."
    )
    caption = f"{what} {about(result)} {devices(result)}"
    return figure(panels, caption, above=legend(result)) + tables.costs(result) + tables.samplers(result)


def devices(result: Loaded) -> str:
    """Where times and memory were measured, as far as the cells note it."""
    found = {cell["device"] for cell in result.cells}, {cell["training"]["device"] for cell in result.cells}
    sampling, training = (", ".join(sorted(names - {None})) or "a device not noted" for names in found)
    return f"Sampling on {sampling}; training on {training}. Seconds are of training alone, without the drawing of pairs."


def samples(result: Loaded) -> str:
    """The picture of samples, in a box that scrolls where the page is narrow."""
    alt = f"Samples of {', '.join(result.names)} at {', '.join(tables.steps(result))}; each column starts from the same noise"
    caption = (
        f"The first samples, not chosen, of training seed {min(result.doc['seeds'])}. "
        "Sample j starts from the same noise in all rows and at all numbers of steps."
    )
    picture = f'<img src="{embedded(result)}" alt="{escape(alt)}">'
    box = f'<div class="scroll samples" tabindex="0" role="region" aria-label="Samples">{picture}</div>'
    return f"<figure>{box}<figcaption>{escape(caption)}</figcaption></figure>"


def embedded(result: Loaded) -> str:
    """The picture of samples as a data: address, WebP of a width that still shows the pixels: a third of the PNG's size."""
    try:
        picture = Image.open(io.BytesIO(result.samples or b"")).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{result.folder}/samples.png: not a picture ({' '.join(str(error).split())})") from None
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def paths(result: Loaded) -> str:
    """The ways from noise to data, before and after."""
    (_, _, first), *_ = figures.flows(result)
    kind, steps = first["paths"]["kind"], len(first["paths"]["t"]) - 1
    of = f"{len(first['paths']['value'])} pixels" if kind == "pixels" else f"{len(first['paths']['x'])} points"
    caption = (
        f"Paths of {of} of the held-out noise, the same in every plot, by Euler’s rule in {steps} equal steps, without guidance; "
        f"training seed {min(result.doc['seeds'])}. Straight ones need one step. Rows that share their weights share a plot."
    )
    return figure(figures.paths(result), caption, "panels small")


def over_time(result: Loaded) -> str:
    """Straightness, acceleration and relative loss over t."""
    (_, _, first), *_ = figures.flows(result)
    caption = (
        f"By t, means over {first['along_time']['num']} paths with 95 % intervals, per dimension: the squared difference of the "
        "velocity from the straight line between a path’s ends, whose mean over t is the straightness; and the change of the "
        "velocity along the path. For rows that were trained, the last loss of held-out pairs over its mean over all t. "
        f"Training seed {min(result.doc['seeds'])}. Rows that share their weights share a line, in the first one’s colour."
    )
    return figure([figures.over_time(result, name) for name in figures.CURVES], caption, "panels three", legend(result))


OF_ONE_CELL = ("weights", "profile", "solver", "grid", "nfe", "t_max", "guidance")  #: parts of a protocol in which cells differ


def protocol(result: Loaded) -> str:
    """How all cells were measured: what they share, in full."""
    shared = {key: value for key, value in result.cells[0]["protocol"].items() if key not in OF_ONE_CELL}
    lines = [
        *flat("", shared),
        ("NFE", ", ".join(map(str, result.nfe))),
        ("training seeds", ", ".join(map(str, result.doc["seeds"]))),
    ]
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in lines)
    return f"<dl>{listed}<dt>sha256 of table.json</dt><dd>{escape(result.doc['sha256'])}</dd></dl>"


def flat(name: str, value: Any) -> list[tuple[str, str]]:
    """A nested mapping as lines of a dotted key and a value."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in flat(f"{name}.{key}".lstrip("."), inner)]
    return [(name, "none" if value in (None, []) else str(value))]


def commands(result: Loaded) -> str:
    """What to type to make the table, or a row of it."""
    rows = "\n\n".join(f"# {row['name']}\n{row['command']}" for row in result.doc["rows"])
    whole = "<p>The whole table; what is finished is read back:</p>"
    return f"{whole}{typed(result.doc['command'])}<p>A row of it:</p>{typed(rows)}"


def typed(text: str) -> str:
    """Text as it is typed."""
    return f"<pre><code>{escape(text)}</code></pre>"
