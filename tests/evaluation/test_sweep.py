import itertools
import json

import pytest

from reflow_lab.cli import main
from reflow_lab.evaluation import sweep

FIXED = ("num_images", "evaluation", "features", "reference", "scores", "data", "teacher", "precision")
PROTOCOL = dict.fromkeys(FIXED, 1)


def job(folder, words, distance, **protocol):
    """An evaluation's words and metrics, with intervals of ± 1."""
    names = {"fd_lite0": distance, "fd_lite0_teacher": distance / 2}
    intervals = {name: [value - 1, value + 1] for name, value in names.items()}
    shared = {"folder": str(folder / "evaluate" / "key"), "num_images": 10, "floor": 3.0, "distance": "fd_lite0"}
    shared |= {"nfe": 1.0, "network_calls": 1.0}
    return words.split(), {**names, **shared, "intervals": intervals, "protocol": PROTOCOL | protocol | {"grid": words}}


def swept(folder, capsys):
    (out,) = (folder / "sweeps").iterdir()
    return out, capsys.readouterr().out


def test_steps_run_along_the_columns_and_what_else_was_varied_down_the_rows(tmp_path, capsys):
    jobs = [job(tmp_path, f"inf/solver={s} nfe={n} seed=0", d) for s, n, d in [("dpm", 9, 8), ("dpm", 1, 40), ("euler", 9, 16)]]
    sweep.finish(jobs)
    out, said = swept(tmp_path, capsys)
    assert "| | 1 NFE | 9 NFE |" in said and "real against real 3" in said
    assert "| dpm | 20.0 ± 1.0 | 4.0 ± 1.0 |" in said, "the primary distance, first"
    assert "| euler |  | 16.0 ± 1.0 |" in said, "the distance to the data; a cell that was not asked for is empty"
    assert "seed" not in said and said.index("fd_lite0_teacher") < said.index("## fd_lite0\n")
    assert (out / "table.md").read_text() in said
    table = json.loads((out / "table.json").read_text())
    assert [(cell["words"]["nfe"], cell["fd_lite0"]) for cell in table] == [("9", 8), ("1", 40), ("9", 16)]
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG" and "dpm" in (out / "quality.svg").read_text()


def test_the_same_sweep_again_writes_the_same_bytes(tmp_path):
    jobs = [job(tmp_path, f"nfe={n}", 10 + n) for n in (1, 2)]
    contents = []
    for _ in range(2):
        sweep.finish(jobs)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "sweeps").rglob("*.*")})
    assert contents[0] == contents[1] and len(contents[0]) == 4


@pytest.mark.parametrize(
    ("words", "columns", "rows"),
    [
        (["inf.grid.kappa=5 run=a", "inf.grid.kappa=20 run=a"], "inf.grid.kappa", []),
        (["run=a inf.solver.r=1", "run=b inf.solver.r=0.4"], "inf.solver.r", ["run"]),
        (["inf/grid=edm inf/solver=dpm", "inf/grid=uniform inf/solver=euler"], "inf/solver", ["inf/grid"]),
        (["nfe=2 seed=1", "nfe=2 seed=1"], "seed", []),
    ],
)
def test_without_steps_a_varied_number_runs_along_the_columns(tmp_path, words, columns, rows):
    found = [sweep.Job(dict(w.split("=") for w in line.split()), {}) for line in words]
    assert sweep.layout(found)[::2] == (columns, rows)


def test_numbers_are_in_order_of_size(tmp_path):
    found = [sweep.Job({"nfe": n}, {}) for n in ("9", "15", "2")]
    assert sweep.layout(found).values == ["2", "9", "15"]


@pytest.mark.parametrize("part", FIXED)
def test_cells_that_do_not_compare_make_no_table(tmp_path, capsys, part):
    sweep.finish([job(tmp_path, "nfe=1", 5), job(tmp_path, "nfe=2", 4, **{part: 2})])
    assert f"({part})" in capsys.readouterr().out and not (tmp_path / "sweeps").exists()


def test_commas_are_a_sweep_in_one_command(toy, capsys):
    words = toy.words(f"run={toy.teacher}", "nfe=1,3", "inf/solver=euler,heun", "evaluation.num_images=200")
    assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")][:3]
    assert rows[0] == "| | 1 NFE | 3 NFE |" and [row.split(" | ")[0] for row in rows[1:]] == ["| euler", "| heun"]
    one_step = {row.split(" | ")[1] for row in rows[1:]}
    assert len(one_step) == 1, "at one step every solver is Euler's, and the cell is shared"
    folders = [line.rpartition(": ")[2] for line in said.splitlines() if "evaluate/" in line]
    assert len(folders) == 4 and len(set(folders)) == 3


def test_one_evaluation_makes_no_table(toy, capsys):
    assert main(["evaluate", *toy.words(f"run={toy.teacher}", "nfe=3", "evaluation.num_images=200")]) == 0
    assert "|" not in capsys.readouterr().out


def test_lines_that_coincide_are_one_and_say_so():
    def row(*values):
        return {str(at): sweep.Job({}, {"fd": value}) for at, value in enumerate(values)}

    rows = {"euler": row(3.0, 2.0), "heun": row(3.0, 1.0), "dpm": row(3.0, 1.0), "rfpp": row(3.0)}
    assert {name: len(found) for name, found in sweep.distinct(rows, "fd").items()} == {"euler": 2, "heun = dpm": 2, "rfpp": 1}


def test_lines_that_meet_show_below_each_other():
    """The later the line the thinner it and its marks are, and the higher it lies."""
    styles = [sweep.style(number, 6) for number in range(6)]
    for key, direction in (("linewidth", -1), ("markersize", -1), ("zorder", 1)):
        sizes = [style[key] for style in styles]
        assert sizes == sorted(sizes, reverse=direction < 0) and len(set(sizes)) == 6
    assert all(a["linestyle"] != b["linestyle"] and a["marker"] != b["marker"] for a, b in itertools.pairwise(styles))
