import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from reflow_lab import cli
from reflow_lab.report import figures, loaded, svg
from reflow_lab.studies import results

NFE = (1, 4)
ROWS = {"base flow": None, "BSL": "base flow", "<b>+DYN & co</b>": "BSL"}
VALUES = {"base flow": (2000.0, 400.0), "BSL": (240.0, 90.0), "<b>+DYN & co</b>": (150.0, 120.0)}
VOID = {"meta", "img", "br", "hr", "link", "input"}
FETCHES = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "formaction", "ping"}


def cell(name, seed, nfe, value):
    return {
        "name": name,
        "seed": seed,
        "nfe": float(nfe),
        "num_images": 500,
        "fd_lite0_teacher": value + seed,
        "fd_lite0": 2 * value,
        "floor": 50.0,
        "straightness": 0.05,
        "ms_per_image": 0.8 * nfe,
        "peak_memory_mb": 30.0,
        "training": {"kimg": 80.0, "seconds": 400.0, "device": "a processor"},
        "device": "a processor",
        "sampler": "Heun on Uniform",
        "protocol": {"nfe": nfe, "num_images": 500, "weights": "w", "grid": [1.0, 0.0], "features": {"network": "Lite0"}},
    }


def entry(name, nfe, metric, value, half):
    ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    return {"name": name, "nfe": nfe, "metric": metric, "value": value, **ends}


def document(seeds=(0, 1, 2), **changes):
    """A result as a study writes it; the row after the base flow has no interval at the first number of steps."""
    metrics = {"fd_lite0_teacher": 1, "fd_lite0": 2}
    at = [(name, i, nfe) for name in ROWS for i, nfe in enumerate(NFE)]
    doc = {
        "study": "simple_reflow/ladder",
        "title": "A <ladder> of rows",
        "data": "fashion_mnist",
        "command": "reflow-lab study study=simple_reflow/ladder seeds=3",
        "nfe": list(NFE),
        "seeds": list(seeds),
        "metric": "fd_lite0_teacher",
        "metrics": list(metrics),
        "distance": "fd_lite0",
        "paper": "FID at 9 NFE, 50,000 samples",
        "rows": [
            {
                "name": name,
                "overrides": [],
                "against": against,
                "teacher": None,
                "guide": None,
                "paper": {"value": 2.23, "source": "abs"} if name == "BSL" else None,
                "command": f"reflow-lab study study=simple_reflow/ladder 'rows=[{name}]'",
            }
            for name, against in ROWS.items()
        ],
        "estimates": [
            entry(name, nfe, metric, by * VALUES[name][i], None if (name, nfe) == ("BSL", 1) else 12.34)
            for metric, by in metrics.items()
            for name, i, nfe in at
        ],
        "effects": [
            {**entry(name, nfe, metric, by * (VALUES[name][i] - VALUES[ROWS[name]][i]), 5.0), "against": ROWS[name]}
            for metric, by in metrics.items()
            for name, i, nfe in at
            if ROWS[name]
        ],
        "cells": [cell(name, seed, nfe, VALUES[name][i]) for name, i, nfe in at for seed in seeds],
        "code": "0.1.0",
    }
    return doc | changes


def traces(kind):
    t = [1.0, 0.5, 0.0]
    paths = {
        "pixels": {"kind": "pixels", "t": t, "place": [[0, 3, 3], [0, 3, 6]], "value": [[1.5, 0.2, -1.0], [0.1, 0.4, 0.7]]},
        "points": {"kind": "points", "t": t, "x": [[1.5, 0.2, -1.0]], "y": [[0.3, 0.6, 0.4]]},
    }[kind]
    curve = {"mean": [0.5, 0.01], "standard_error": [0.01, 0.001]}
    along = {"t": [0.25, 0.75], "num": 32, "deviation": curve, "acceleration": curve}
    loss = {"t": [0.25, 0.75], "min": [0.1, 0.2], "mean": [0.5, 1.5], "max": [3.0, 4.0]}
    one = {"paths": paths, "along_time": along}
    base, taught = one | {"weights": "a", "relative_loss": None}, one | {"weights": "b", "relative_loss": loss}
    return {"rows": dict(zip(ROWS, (base, taught, taught), strict=True))}


def written(folder, kind="pixels", **changes):
    """A study's folder, with all that it may hold."""
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder, document(**changes))
    (folder / "traces.json").write_text(json.dumps(traces(kind)))
    Image.linear_gradient("L").save(folder / "samples.png")
    return folder


class Page(HTMLParser):
    """All elements of a page, in order; what is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        self.open += [] if name in VOID else [name]

    def handle_startendtag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data.strip())

    def all(self, name):
        return [attributes for found, attributes in self.found if found == name]


def report(*folders, out):
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    studies = [written(folder / "a"), written(folder / "b", "points", seeds=(7,), effects=[])]
    return report(*studies, out=folder / "new" / "report.html")


def test_nothing_is_fetched_and_nothing_runs(text):
    page = Page(text)
    assert not {name for name, _ in page.found} & {"script", "link", "iframe", "object", "embed", "base", "video", "audio", "use"}
    for name, attributes in page.found:
        assert not any(key.startswith("on") for key in attributes)
        for key in FETCHES & attributes.keys():
            assert attributes[key].startswith("data:image/" if name == "img" else "#")
    assert not re.search(r"url\(|@import|https?:|javascript:", text)
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_every_picture_decodes_and_is_described(text):
    page = Page(text)
    for image in page.all("img"):
        head, data = image["src"].split(",", 1)
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        picture.load()
        assert head == "data:image/webp;base64" and min(picture.size) > 100 and "each column" in image["alt"]
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(page.all("img")) == 2 and len(drawn) == len(page.all("svg")) > 30
    for picture in drawn:
        tree = ElementTree.fromstring(picture)
        assert tree.get("aria-hidden") == "true" or len(tree.get("aria-label")) > 20
        _, _, width, height = map(float, tree.get("viewBox").split())
        assert list(tree.iter()) != [tree]
        for element in tree.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert -1 <= float(element.get(key, 0)) <= width + 1
            for key in ("y", "y1", "y2", "cy"):
                assert -1 <= float(element.get(key, 0)) <= height + 1
            assert not re.search("nan|inf", " ".join(element.get(key, "") for key in ("points", "d", "x", "y", "width")))


def test_anchors_resolve_and_differ(text):
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(set(ids)) == len(ids) and {"simple-reflow-ladder", "simple-reflow-ladder-2"} <= set(ids)
    assert links and all(link.removeprefix("#") in ids for link in links)
    assert {attributes["aria-labelledby"] for attributes in page.all("article")} <= set(ids)


def test_it_says_what_the_numbers_are(text):
    assert text.count("N = 500 samples a cell") == 2 + 3 + 2  # beside every study and figure with numbers
    assert "3 training seeds (Student&#x27;s t)" in text and "one training seed" in text
    assert "<td>400<small>[388, 412]</small></td>" in text and "2.23 [abs]" in text
    assert '<td class="best">90<small>[78, 102]</small></td>' in text
    assert "<td>−1,760.0<small>[−1,765.0, −1,755.0]</small></td>" in text
    assert "<dt>features.network</dt><dd>Lite0</dd>" in text and results.seal(document()) in text
    assert text.count("reflow-lab study study=simple_reflow/ladder seeds=3</code>") == 2
    assert "<ladder>" not in text and "<b>+DYN" not in text and "&lt;b&gt;+DYN &amp; co" in text


def test_what_was_not_measured_is_left_out(text, tmp_path):
    assert text.count(">Effects</h3>") == 1 and text.count(">Paths</h3>") == text.count(">Samples</h3>") == 2
    bare = tmp_path / "bare"
    bare.mkdir()
    results.write(bare, document())
    found = report(bare, out=tmp_path / "bare.html")
    assert not re.search(">(Paths|Over time|Samples)</h3>", found) and ">Values</h3>" in found


def test_an_older_result_that_notes_less(tmp_path):
    doc = document()
    for found in doc["cells"]:
        found |= {"device": None, "sampler": None, "peak_memory_mb": None, "floor": None}
        found["training"] = dict.fromkeys(("kimg", "seconds", "device"))
    results.write(tmp_path, doc)
    text = report(tmp_path, out=tmp_path / "r.html")
    assert "Sampling on a device not noted; training on a device not noted." in text
    assert ">None<" not in text and "Samplers: " not in text and "<td>–</td>" in text


def test_the_same_results_make_the_same_page(text, tmp_path):
    folder = written(tmp_path / "a")
    assert report(folder, out=tmp_path / "1.html") == report(folder, out=tmp_path / "2.html")


def test_bars_are_as_long_as_their_values(tmp_path):
    result = loaded.read(written(tmp_path / "a"))
    tree = ElementTree.fromstring("<p>" + "".join(figures.ladder(result, 4).parts) + "</p>")
    lengths = [float(bar.get("width")) for bar in tree.iter("rect")]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 90 / 400, 120 / 400], abs=2e-3)
    whisker = next(tree.iter("path")).get("d")
    left, right = (float(x) for x in re.match(r"M([\d.]+),[\d.]+L([\d.]+),", whisker).groups())
    assert (right - left) / lengths[0] == pytest.approx(2 * 12.34 / 400, abs=2e-3)
    assert len(list(tree.iter("path"))) == 3
    assert len(re.findall("<path", "".join(figures.ladder(result, 1).parts))) == 2  # one value has no interval


def test_effects_are_shares_of_what_they_are_measured_against(tmp_path):
    result = loaded.read(written(tmp_path / "a"))
    tree = ElementTree.fromstring("<p>" + "".join(figures.effects(result, 4).parts) + "</p>")
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in tree.iter("rect")]
    zero = next(float(line.get("x1")) for line in tree.iter("line") if line.get("class") == "zero")
    assert sum(bars[0]) == pytest.approx(zero, abs=0.2) and bars[1][0] == pytest.approx(zero, abs=0.2)
    assert bars[1][1] / bars[0][1] == pytest.approx((30 / 90) / (310 / 400), abs=5e-3)
    assert len(list(tree.iter("circle"))) == 6  # three seeds of two rows
    assert "−310.0 [−315.0, −305.0]" in [word.text for word in tree.iter("text")]


def test_effects_of_nothing(tmp_path):
    none = [{**entry("BSL", 1, "fd_lite0_teacher", 0.0, 0.0), "against": "base flow"}]
    doc = document(effects=none)
    for found in doc["cells"]:
        found["fd_lite0_teacher"] = 100.0
    results.write(tmp_path, doc)
    (bar,) = ElementTree.fromstring("<p>" + "".join(figures.effects(loaded.read(tmp_path), 1).parts) + "</p>").iter("rect")
    assert float(bar.get("width")) == 0.5  # a line that can be seen
    assert svg.spanning([3, 3], 0, 1, log=False)(3) == pytest.approx(0.5)


def test_rows_of_the_same_weights_share_a_plot(tmp_path):
    result = loaded.read(written(tmp_path / "a"))
    assert [names for names, _, _ in figures.flows(result)] == ["base flow", "BSL, <b>+DYN & co</b>"]
    assert len(figures.paths(result)) == 2 and [figures.over_time(result, name) is None for name in figures.CURVES] == [False] * 3


def test_curves_over_time_have_their_intervals(tmp_path):
    result = loaded.read(written(tmp_path / "a"))
    panel = figures.over_time(result, "straightness")
    (low, high), *_ = re.findall(r'y1="([\d.]+)"[^>]*y2="([\d.]+)" stroke="var', "".join(panel.parts))
    middle, *_ = re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', "".join(panel.parts))
    assert float(low) > float(middle) > float(high)
    assert 'stroke-width="1.25"' not in "".join(figures.over_time(result, "relative loss").parts)
    folder = tmp_path / "a"
    (folder / "traces.json").write_text(json.dumps({"rows": {"base flow": traces("pixels")["rows"]["base flow"]}}))
    assert figures.over_time(loaded.read(folder), "relative loss") is None  # it was not trained


def test_axes(tmp_path):
    result = loaded.read(written(tmp_path / "a"))
    panel = "".join(figures.quality(result, "fd_lite0_teacher", "nfe").parts)
    marks = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', panel)]
    assert len(marks) == 2 and ">1000<" in panel  # logarithmic: values span a decade
    assert svg.Scale(1, 100, 0, 10, True)(10) == pytest.approx(5) and svg.Scale(0, 4, 10, 0)(1) == 7.5
    assert svg.Scale(1, 100, 0, 10, True)(1e9) == 10  # at the edge, never outside
    assert svg.linear_ticks(-0.3, 1.1, 5) == [0, 0.5, 1] and svg.linear_ticks(-41, 9, 5) == [-40, -30, -20, -10, 0]
    assert svg.log_ticks(40, 2500) == [50, 100, 200, 500, 1000, 2000] and svg.log_ticks(1e-4, 3) == [1e-4, 1e-3, 1e-2, 0.1, 1]
    assert [svg.number(v) for v in (0, 0.02, -5, 20000, 1e5, 2.5e-7)] == ["0", "0.02", "−5", "20000", "10⁵", "2.5·10⁻⁷"]


@pytest.mark.parametrize("value, half, words", [(47.23, 10.5, "47 [37, 58]"), (-0.00002, 0.0003, "−0.00002 [−0.00032, 0.00028]")])
def test_digits_follow_the_interval(value, half, words):
    assert " ".join(figures.shown({"value": value, "low": value - half, "high": value + half})) == words


def test_a_value_without_interval_and_a_zero():
    none = {"low": None, "high": None}
    assert figures.shown({"value": 1234.567, **none}) == ("1,235", "") and figures.shown({"value": -0.0, **none}, True) == (
        "0",
        "",
    )


def test_an_interval_that_reaches_zero_leaves_the_axis_logarithmic(tmp_path):
    low = [
        entry(name, nfe, "fd_lite0_teacher", VALUES[name][i], VALUES[name][i] + 1) for name in ROWS for i, nfe in enumerate(NFE)
    ]
    result = loaded.read(written(tmp_path / "a", estimates=low))
    panel = figures.quality(result, "fd_lite0_teacher", "nfe")
    assert ">1000<" in "".join(panel.parts)
    bottoms = [float(y) for y in re.findall(r'y1="([\d.]+)"[^>]*stroke="var', "".join(panel.parts))]
    assert bottoms == [panel.upwards[0]] * 6


def test_rows_look_different():
    assert len({svg.style(i) for i in range(28)}) == 28


def test_by_default_all_results_that_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err.startswith("reflow-lab: no table.json below experiments/results or outputs: run a study first")
    written(Path("experiments/results/one"))
    written(Path("outputs/deep/two"), seeds=(7, 8))
    written(Path("outputs/copy"))
    sweep = Path("outputs/sweeps/0123")
    sweep.mkdir(parents=True)
    (sweep / "table.json").write_text("[]")  # a sweep of evaluate, which is no study
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().out.startswith("written: report.html (2 studies, 0.")
    assert Path("report.html").read_text().count("<article") == 2  # a copy is told once


def refused(capsys, *words):
    assert cli.main(["report", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("reflow-lab: ")


def test_bad_input(tmp_path, capsys):
    folder = written(tmp_path / "a")
    assert refused(capsys, tmp_path) == f"FOLDER={tmp_path}: has no table.json: it is not the folder of a study"
    assert refused(capsys, folder, "--out", tmp_path) == f"--out={tmp_path}: is a folder; give the name of a file"
    (folder / "samples.png").write_bytes(b"no picture")
    assert refused(capsys, folder, "--out", tmp_path / "r.html").startswith(f"{folder}/samples.png: not a picture")
    (folder / "traces.json").write_text("[]")
    assert refused(capsys, folder).startswith(f"{folder}/traces.json: not the traces of a study")
    (folder / "traces.json").unlink()
    table = folder / "table.json"
    table.write_text(table.read_text().replace("2000.0", "2001.0"))
    assert refused(capsys, folder).startswith(f"{table}: was changed after it was written")
    table.write_text("[{}]")
    assert refused(capsys, folder).startswith(f"{table}: not the result of a study")
    assert not (tmp_path / "r.html").exists()
