import json
import math
import re

import pytest
import torch

from reflow_lab.evaluation.values import Z95
from reflow_lab.studies import results, table
from reflow_lab.studies.description import Row, Study
from reflow_lab.studies.estimates import COLUMNS, build, effect, estimate

STUDY = Study("A title", (), (1, 9), (Row("base", ("a=1",)), Row("better", ("a=2",), "base")))
VALUES = {("base", 0): 30.0, ("base", 1): 34.0, ("base", 2): 26.0, ("better", 0): 21.0, ("better", 1): 23.0, ("better", 2): 19.0}
METRICS = ("fd_lite0", "fd_lite0_added", "fd_lite0_teacher", "paired_rmse")  # as JSON sorts them


def markdown(study, cells):
    return table.markdown(build(study, cells, "here", []))


def vector(*key):
    """Bootstrap values that depend on the cell alone."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(50, generator=generator, dtype=torch.float64)


def make_cells(folder, seeds, metrics=METRICS, nfe=(1, 9)):
    """Cells in no good order, each with its folder of resamples."""
    cells = []
    for (name, seed), value in reversed(VALUES.items()):
        for steps in nfe if seed in seeds else ():
            path = folder / f"{name}{seed}{steps}"
            path.mkdir(parents=True)
            values = dict.fromkeys(metrics, value / steps)
            (path / "resamples.json").write_text(
                json.dumps({m: (v + vector(name == "base", seed, steps)).tolist() for m, v in values.items()})
            )
            rest = {
                "nfe": float(steps),
                "network_calls": float(steps),
                "seed": seed,
                "floor": 12.34,
                "straightness": 0.5,
                "ms_per_image": 2.0 * steps,
                "peak_memory_mb": 100.0 * steps,
                "device": "a processor",
                "sampler": f"Euler on Uniform, {name}",
                "training": {"kimg": 30.0, "seconds": 61.0 + seed, "device": "a GPU"},
                "num_images": 2500,
                "scores": [],
                "distance": "fd_points" if "fd_points" in metrics else "fd_lite0",
            }
            intervals = {metric: [v - 1, v + 1] for metric, v in values.items()}
            about = {
                "name": name,
                "overrides": ["a=1"],
                "teacher": None,
                "run": "r",
                "folder": str(path),
                "protocol": {"nfe": steps},
            }
            cells.append({**about, **rest, **values, "intervals": intervals})
    return cells


@pytest.fixture
def one(tmp_path):
    return make_cells(tmp_path, [0])


@pytest.fixture
def three(tmp_path):
    return make_cells(tmp_path, [0, 1, 2])


def pick(cells, name, nfe):
    return sorted((c for c in cells if c["name"] == name and c["nfe"] == nfe), key=lambda c: c["seed"])


def test_one_seed_bootstraps_the_difference(one):
    found = effect(pick(one, "better", 9), pick(one, "base", 9), "fd_lite0_teacher")
    spread = float((vector(False, 0, 9) - vector(True, 0, 9) - 1).std())
    assert found.value == pytest.approx(-1)
    assert (found.low, found.high) == pytest.approx((-1 - Z95 * spread, -1 + Z95 * spread))


def test_three_seeds_pair_by_seed(three):
    """Differences -9, -11, -7: mean -9, standard deviation 2, t(2) = 4.302653."""
    found = effect(pick(three, "better", 1), pick(three, "base", 1), "fd_lite0")
    half = 4.302653 * 2 / 3**0.5
    assert found.value == pytest.approx(-9) and (found.low, found.high) == pytest.approx((-9 - half, -9 + half), rel=1e-6)


def test_rows_that_do_not_train_vary_with_the_noise_alone(tmp_path):
    """Equal in every seed, so that over seeds their difference would seem certain."""
    cells = make_cells(tmp_path, [0, 1, 2])
    for cell in cells:
        cell["fd_lite0"] = 30.0 if cell["name"] == "base" else 27.0
    found = effect(pick(cells, "better", 1), pick(cells, "base", 1), "fd_lite0")
    assert found.value == -3 and found.high - found.low > 0.1


def test_one_seed_has_the_interval_of_its_cell(one):
    single = estimate(pick(one, "base", 1), "fd_lite0")
    assert (single.value, single.low, single.high) == (30, 29, 31)


def test_the_page_shows_effects_of_three_seeds(three):
    page = markdown(STUDY, three)
    half = 4.302653 * 2 / 3**0.5
    assert f"| better against base | -9.0 ± {half:.1f} | -1.0 ± {half / 9:.1f} |" in page
    assert "training seeds 0, 1, 2; 95 % intervals over 3 training seeds (Student's t)" in page
    assert f"| base | 30.0 ± {4.302653 * 4 / 3**0.5:.1f} |" in page


def test_the_page(one):
    page = markdown(STUDY, one)
    order = [
        "# A title",
        "## fd_lite0_teacher:",
        "## Effect of each row on fd_lite0_teacher",
        "## fd_lite0: distance to the data (real against real: 12.34)",
        "## fd_lite0_added: distance to the data beyond that of the teacher's many-step samples",
    ]
    places = [page.index(title) for title in [*order, "## paired_rmse", "## Straightness"]]
    assert places == sorted(places)
    assert (
        "N = 2,500 samples a cell; training seeds 0; 95 % intervals over the held-out noise (bootstrap); one training seed."
        in page
    )
    assert "| base | 0.5000 | 2.00 | 18.00 | 900 | 30 | 61 |" in page
    widths = [[line.count("|") for line in block.splitlines() if line.startswith("|")] for block in page.split("##")]
    assert all(len(set(width)) <= 1 for width in widths)


def test_without_a_teacher_the_distance_to_the_data_is_first(tmp_path):
    page = markdown(STUDY, make_cells(tmp_path, [0], ["fd_points"]))
    assert (
        "_teacher" not in page
        and "_added" not in page
        and "paired_rmse" not in page
        and "Effect of each row on fd_points" in page
    )
    assert re.search(r"\| base \| 30\.0000 ± \d\.\d{4} \|", page)


def test_no_effects_no_section(one):
    alone = Study("t", (), (1, 9), (Row("base", ()), Row("better", ())))
    assert "Effect" not in markdown(alone, one) and build(alone, one, "here", [])["effects"] == []


def test_an_adaptive_solvers_cells_are_found_by_what_was_asked_for(one):
    for cell in one:
        cell["nfe"] = 57.3
    assert "| base | 30.0 ±" in markdown(STUDY, one)


def test_files(tmp_path, one):
    results.write(tmp_path, result := build(STUDY, one, "here", []))
    text = table.write(tmp_path, result)
    assert (tmp_path / "table.md").read_text() == text
    rows = json.loads((tmp_path / "table.json").read_text())["cells"]
    promised = {
        "name",
        "overrides",
        "nfe",
        "fd_lite0",
        "floor",
        "fd_lite0_teacher",
        "paired_rmse",
        "straightness",
        "ms_per_image",
        "seed",
        "intervals",
    }
    assert len(rows) == 4 and {frozenset(row) for row in rows} == {frozenset({*COLUMNS, *METRICS})}
    assert promised <= set(rows[0]) and not math.isnan(rows[0]["floor"])


def test_costs(three):
    page = markdown(STUDY, three)
    assert "| | straightness | ms at 1 NFE | ms at 9 NFE | memory MB | trained on kimg | in seconds |" in page
    assert "| better | 0.5000 | 2.00 | 18.00 | 900 | 30 | 62 |" in page  # seconds: the mean of 61, 62 and 63
    assert "Sampling on a processor; training on a GPU." in page


def test_a_run_that_did_not_note_its_cost_has_a_dash(one):
    for cell in one:
        cell["training"] = {"kimg": None, "seconds": None, "device": None}
    page = markdown(STUDY, one)
    assert "| base | 0.5000 | 2.00 | 18.00 | 900 | – | – |" in page and "training on a device not noted." in page
