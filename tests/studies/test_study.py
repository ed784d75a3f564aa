import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from reflow_lab import cli
from reflow_lab.errors import UserError
from reflow_lab.evaluation import evaluate
from reflow_lab.networks import files
from reflow_lab.studies import study as verb
from reflow_lab.studies.description import Row, Study, chosen, find, read
from reflow_lab.studies.estimates import COLUMNS
from reflow_lab.studies.request import key, merged
from reflow_lab.studies.study import needed
from reflow_lab.training import train

ROWS = [
    {"name": "base flow", "overrides": ["training.total_kimg=0"]},
    {"name": "BSL", "overrides": ["dyn=baseline"], "against": "base flow"},
    {"name": "+time", "overrides": ["dyn=baseline", "dyn/time=exponential"], "against": "BSL"},
]
SHORT = ["dyn=baseline", "lrn=baseline", "inf=baseline", "training.total_kimg=2"]


def write(folder, name="ladder", **changes):
    """A study file in ./experiments of a working folder."""
    path = folder / "experiments" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"title": "A ladder", "overrides": [], "nfe": [1, 3], "rows": ROWS} | changes))
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(toy, work, capsys):
    """Run the study of the working folder: (status, stdout, the last line of stderr)."""

    def run(*more, name="ladder"):
        status = cli.main(["study", f"study={name}", *toy.words(*more)])
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line.startswith("reflow-lab: ")]

    return run


def cells(folder):
    return json.loads((Path(folder) / "table.json").read_text())["cells"]


def stores(outputs):
    return sorted(path.parent.name for path in outputs.glob("pairs/*/done.json"))


@pytest.fixture
def forbid_training(monkeypatch):
    def fit(*_):
        raise AssertionError("trained")

    return lambda: monkeypatch.setattr(train, "fit", fit)


def test_a_study_and_the_same_again(toy, run, work, forbid_training, monkeypatch):
    write(work, overrides=SHORT)
    outputs = work / "shared"
    words = [f"outputs={outputs}", "out=here", "seeds=2", "seed=5"]
    status, out, _ = run(*words)
    rows, text, picture = cells("here"), Path("here/table.md").read_text(), Path("here/samples.png").read_bytes()
    assert status == 0 and text in out
    assert [(row["name"], row["seed"], row["nfe"]) for row in rows] == [
        (row["name"], seed, nfe) for row in ROWS for seed in (5, 6) for nfe in (1, 3)
    ]
    assert all(set(row) == {*COLUMNS, "fd_points", "fd_points_added", "fd_points_teacher", "paired_rmse"} for row in rows)
    assert {row["teacher"] for row in rows} == {None}
    assert [row["training"]["kimg"] for row in rows[::4]] == [0, 1.984, 1.984]  # whole steps of 32
    assert all((row["training"]["seconds"] > 0) == (row["training"]["kimg"] > 0) for row in rows)
    assert len(stores(outputs)) == 2  # to train on, and the held-out noise; both shared by all rows and seeds
    assert {row["protocol"]["teacher"] for row in rows} <= set(stores(outputs))
    with Image.open("here/samples.png") as image:
        assert image.width > image.height > 100

    forbid_training()
    monkeypatch.setattr(evaluate, "Drawing", None)
    assert run(*words)[0] == 0
    assert Path("here/table.md").read_text() == text and cells("here") == rows
    assert Path("here/samples.png").read_bytes() == picture


def test_a_row_that_does_not_train_is_its_start(toy, run, work):
    write(work, overrides=SHORT, rows=ROWS[:1], nfe=[3])
    run("inf/solver=heun_sigma", "inf/grid=edm", "out=out")  # as the pairs are drawn
    (cell,) = cells("out")
    assert cell["paired_rmse"] < 1e-5


def test_rows_win_over_the_command_line_and_it_over_the_study(run, work, monkeypatch):
    seen = []
    monkeypatch.setattr(verb, "trained", lambda planned, runs: seen.append(planned))
    monkeypatch.setattr(verb, "measured", lambda planned, runs: [])
    monkeypatch.setattr(verb, "write", lambda *_: None)
    write(work, overrides=["training.total_kimg=2", "dyn/weight=edm", "training.lr=1e-5", "scale=mini"])
    run("training.total_kimg=3", "dyn/weight=velocity", "scale=demo", "net=mlp", "seed=4")
    base, other = (planned.configs[0] for planned in seen[:2])
    assert (base.training.total_kimg, other.training.total_kimg) == (0, 3)
    assert other.dyn.weight.power == 2 and other.training.lr == 1e-5
    assert other.seed == 4 and other.name == "BSL seed 4"
    assert [cfg.nfe for cfg in seen[0].configs] == [1, 3]


def test_a_failing_row_stops_no_other_and_is_named_at_the_end(toy, run, work):
    """Status 1; the table has the others."""
    write(work, overrides=SHORT, rows=[*ROWS[:2], {"name": "wild", "overrides": ["training.lr=1e9"], "against": "BSL"}, ROWS[2]])
    status, _, errors = run("seeds=2", "out=here")
    assert status == 1 and {cell["name"] for cell in cells("here")} == {"base flow", "BSL", "+time"}
    (line,) = errors
    assert line.startswith("reflow-lab: 2 of 8 runs failed, and their rows are not in the table: wild seed 0: loss=")
    said = Path("here/table.md").read_text()
    assert "wild seed 1" in line and "Not in the table, since they failed: wild seed 0: loss=" in said and "| wild" not in said


def test_a_guide_that_fails_is_trained_once(run, work, monkeypatch):
    """The row that it guides fails with it, at once and untrained; the next study tries again."""
    rows = [
        {"name": "weak", "overrides": ["training.lr=1e9", "training.total_kimg=1"]},
        {"name": "led", "overrides": ["inf/guidance=auto", "inf.guidance.weight=2"], "guide": "weak"},
    ]
    write(work, overrides=SHORT, rows=rows, nfe=[1])
    fit, seen = train.fit, []
    monkeypatch.setattr(train, "fit", lambda cfg, made: (seen.append(cfg.name), fit(cfg, made)))
    for _ in range(2):
        status, _, (line,) = run(f"outputs={work}/own")
        assert status == 1 and "weak seed 0: loss=" in line and "led seed 0: weak seed 0 failed before: loss=" in line
    assert seen == ["weak seed 0", "weak seed 0"]


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_any_launcher_runs_the_rows(toy, run, work, launcher):
    """Side by side in processes that share teacher's samples and pairs: the same cells but for their times."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    timed = ("ms_per_image", "training", "run")
    write(work, overrides=SHORT)
    assert run("out=one", f"outputs={work}/one")[0] == run("out=many", f"outputs={work}/many", f"launcher={launcher}")[0] == 0
    one, many = ([{k: v for k, v in cell.items() if k not in timed} for cell in cells(name)] for name in ("one", "many"))
    assert one == many and len(stores(work / "many")) == 2


def test_a_row_may_be_guided_by_an_earlier_one(toy, run, work):
    """Away from its run of the same seed; at weight 0 that is no guidance, beside that it is."""
    led = ["inf/guidance=auto", "inf.guidance.weight="]
    rows = [{"name": "weak", "overrides": ["training.total_kimg=1"]}, {"name": "none", "overrides": []}]
    rows += [{"name": f"w {w}", "overrides": [led[0], led[1] + w], "guide": "weak", "against": "none"} for w in ("0", "2")]
    write(work, overrides=SHORT, rows=rows, nfe=[4])
    assert run("out=here")[0] == 0
    weak, none, zero, two = cells("here")
    assert none["fd_points"] == zero["fd_points"] != two["fd_points"]
    assert two["network_calls"] == 8 and none["network_calls"] == 4
    assert files.weights_hash(files.find(weak["run"])) in str(two["protocol"]["guidance"])


def test_the_papers_numbers_stand_beside_those_measured(toy, run, work):
    """By data set; n/a where they are unknown."""
    known = {"two_moons": {"value": 4.27, "source": "art"}, "cifar10": {"value": 1.0, "source": "abs"}}
    write(work, overrides=SHORT, rows=[{**ROWS[0], "paper": known}, ROWS[1]], paper="FID at 9 NFE")
    run("out=here")
    table = Path("here/table.md").read_text()
    rows = re.search(r"## fd_points: .*?\n\n(.*?)\n\n", table, re.S)[1].splitlines()
    assert rows[0] == "| | 1 NFE | 3 NFE | the paper: FID at 9 NFE |"
    assert rows[2].endswith("| 4.27 [art] |") and rows[3].endswith("| n/a |")
    assert "4.27 [art]" in Path("here/table.tex").read_text() and "1.0 [abs]" not in table


def test_each_rows_command_makes_that_row(toy, run, work):
    write(work, overrides=SHORT)
    run("out=here", "seed=3")
    found = json.loads(Path("here/table.json").read_text())
    words = shlex.split(found["rows"][2]["command"])
    assert words[:3] == ["reflow-lab", "study", "study=ladder"] and 'rows=["+time"]' in words and "seed=3" in words
    assert cli.main([*words[1:], "out=alone", f"outputs={toy.outputs}"]) == 0
    assert cells("alone") == [cell for cell in cells("here") if cell["name"] == "+time"]


AGAIN = [
    {"name": "k = 1", "overrides": []},
    {"name": "k = 2", "overrides": [], "teacher": "k = 1"},
    {"name": "k = 3", "overrides": [], "teacher": "k = 2"},
]


def test_a_row_is_taught_by_an_earlier_one_and_measured_against_the_studys_teacher(toy, run, work):
    """Each run of each seed: what it starts from and where its pairs come from are the run before it, of the same seed."""
    write(work, overrides=SHORT, rows=AGAIN, nfe=[2])
    outputs = work / "shared"
    status, _, _ = run("seeds=2", f"outputs={outputs}", "out=here")
    rows = cells("here")
    assert status == 0 and [row["teacher"] for row in rows] == [None, None, "k = 1", "k = 1", "k = 2", "k = 2"]
    runs = {(row["name"], row["seed"]): Path(row["run"]) for row in rows}
    assert len(set(runs.values())) == 6
    for seed in (0, 1):
        for name, before in (("k = 1", toy.teacher), ("k = 2", runs["k = 1", seed]), ("k = 3", runs["k = 2", seed])):
            weights = files.weights_hash(files.find(before))
            inputs = json.loads((runs[name, seed] / "recipe.json").read_text())["inputs"]
            assert inputs["start"] == weights
            (store,) = inputs["pairs"].values()
            recipe = json.loads((outputs / "pairs" / store / "recipe.json").read_text())
            assert recipe["teacher"] == weights
            assert recipe["seed"] == 1000 + int(name[-1]) - 1  # noise that its teacher has not seen
    assert len({row["protocol"]["teacher"] for row in rows}) == 1
    assert len(stores(outputs)) == 1 + 1 + 2 * 2  # held out; the study's teacher's, shared; one of k = 1 and 2 a seed


def test_a_taught_row_alone_is_made_with_what_it_needs(toy, run, work):
    write(work, overrides=SHORT, rows=AGAIN[:2], nfe=[2])
    assert run("out=whole")[0] == 0 and run("out=alone", 'rows=["k = 2"]')[0] == 0
    assert cells("alone") == [cell for cell in cells("whole") if cell["name"] == "k = 2"]


STAGES = [
    {"name": "first", "overrides": []},
    {"name": "second", "overrides": ["training.lr=1e-4"], "start": "first", "against": "first"},
    {"name": "taught", "overrides": [], "teacher": "first", "start": "second"},
]


def test_a_row_may_start_from_an_earlier_one_and_keep_its_teacher(toy, run, work):
    """Or have another one: weights from one run, pairs from the other."""
    write(work, overrides=SHORT, rows=STAGES, nfe=[2])
    outputs = work / "shared"
    assert run("seeds=2", f"outputs={outputs}", "out=here")[0] == 0
    runs = {(cell["name"], cell["seed"]): Path(cell["run"]) for cell in cells("here")}

    def hashed(path):
        return files.weights_hash(files.find(path))

    def inputs(name, seed):
        found = json.loads((runs[name, seed] / "recipe.json").read_text())["inputs"]
        (store,) = found["pairs"].values()
        return found["start"], json.loads((outputs / "pairs" / store / "recipe.json").read_text())["teacher"]

    for seed in (0, 1):
        first, second = (hashed(runs[name, seed]) for name in ("first", "second"))
        assert inputs("first", seed) == (hashed(toy.teacher), hashed(toy.teacher))
        assert inputs("second", seed) == (first, hashed(toy.teacher))
        assert inputs("taught", seed) == (second, first)
    assert run("out=alone", "rows=[second]", f"outputs={outputs}")[0] == 0
    assert [cell["run"] for cell in cells("alone")] == [str(runs["second", 0])]


DISTILLED = ["training=flow_map", "lrn=flow_map", "inf=flow_map", "training.total_kimg=0.512", "training.batch_size=128"]
FLOW_MAPS = [
    {"name": "weak", "overrides": []},
    {"name": "plain", "overrides": [*DISTILLED, "flow_map=ayf"]},
    {"name": "led", "overrides": [*DISTILLED, "flow_map=ayf", "flow_map/guidance=auto"], "weak": "weak", "against": "plain"},
]


def test_flow_maps_are_rows_and_a_weak_teacher_may_be_one(toy, run, work):
    short = ["training.num_heldout=16", "budget.flow_map.warmup_steps=2"]
    write(work, overrides=[*SHORT, *short], rows=FLOW_MAPS, nfe=[1, 2])
    assert run("out=here")[0] == 0
    runs = {cell["name"]: Path(cell["run"]) for cell in cells("here")}
    about = {name: json.loads((path / "recipe.json").read_text()) for name, path in runs.items()}
    assert about["plain"]["inputs"]["guidance"] is None
    assert about["led"]["inputs"]["guidance"]["guide"] == files.weights_hash(files.find(runs["weak"]))
    assert about["led"]["config"]["flow_map"]["guidance"] == [1.0, 3.0]
    assert {cell["sampler"] for cell in cells("here") if cell["name"] == "led"} == {"FlowMap(gamma=0.0, lam_guid=1.0) on Uniform"}


def test_a_part_of_a_table_does_not_replace_the_whole(toy, run, work):
    write(work, overrides=SHORT)
    run("out=here")
    whole = Path("here/table.json").read_bytes()
    assert run("out=here", "rows=[BSL]")[0] == 0
    assert Path("here/table.json").read_bytes() == whole and {cell["name"] for cell in cells("here/partial")} == {"BSL"}
    assert run("out=here", "seeds=2")[0] == 0 and {cell["seed"] for cell in cells("here")} == {0, 1}


def test_a_table_that_was_changed_by_hand_is_refused_before_any_training(toy, run, work, forbid_training):
    write(work, overrides=SHORT, rows=ROWS[:1])
    run("out=here")
    path = Path("here/table.json")
    path.write_text(path.read_text().replace("A ladder", "A better one"))
    changed = path.read_bytes()
    forbid_training()
    status, _, errors = run("out=here", "seed=7")
    assert (
        status == 2
        and errors[0].endswith("; remove it, or choose another out")
        and "was changed after it was written" in errors[0]
    )
    assert path.read_bytes() == changed


def test_a_mistake_of_the_command_line_is_not_blamed_on_a_row(run, work):
    write(work, overrides=SHORT)
    status, _, errors = run("dyn/weight=none")
    assert status == 2 and errors[0].startswith("reflow-lab: dyn/weight=none: no such member")


def test_a_taught_rows_noise_is_not_that_of_the_evaluation(run, work, forbid_training):
    write(work, overrides=SHORT, rows=AGAIN[:2])
    forbid_training()
    status, _, errors = run("evaluation.seed=1001")
    assert status == 2 and errors[0].startswith("reflow-lab: k = 2: pairs.seed=1001: is the noise of evaluation.seed")


def test_a_study_may_train_its_own_teacher(toy, run, work):
    """Without a teacher of the study, rows are measured against the data alone."""
    base = ["teacher=none", "training.start=scratch", "lrn/coupling=independent"]
    rows = [{"name": "base", "overrides": base}, {"name": "reflow", "overrides": ["teacher=none"], "teacher": "base"}]
    write(work, overrides=SHORT, rows=rows, nfe=[2])
    status = cli.main(["study", "study=ladder", *toy.overrides, "outputs=outputs", "out=here"])
    assert status == 0 and set(cells("here")[0]["intervals"]) == {"fd_points"}


def test_a_row_that_its_teachers_network_does_not_fit_is_found_before_any_training(run, work, forbid_training):
    rows = [*AGAIN[:1], {**AGAIN[1], "overrides": ["net.sigma_data=0.3"]}]
    write(work, overrides=SHORT, rows=rows)
    forbid_training()
    status, _, errors = run()
    line = "teacher.path=the row k = 1: these weights belong to another network; net.sigma_data: 0.5 in the file, 0.3 here"
    line += "; net=teacher takes the teacher's"
    assert status == 2 and errors == [f"reflow-lab: {line}"] and not Path("outputs").exists()


LADDER = Study("a", (), (1,), (Row("base", ()), Row("BSL", (), "base"), Row("+DYN", (), "BSL"), Row("again", (), "BSL", "BSL")))
LED = Study("a", (), (1,), (*LADDER.rows, Row("more", (), teacher="again"), Row("led", (), teacher="BSL", guide="+DYN")))


def test_some_rows_of_a_study_keep_its_order_and_their_effects_where_these_can_be_told():
    assert chosen(LADDER, None) == LADDER
    assert chosen(LADDER, ["+DYN", "BSL"]).rows == (Row("BSL", ()), Row("+DYN", (), "BSL"))


def test_what_a_row_needs_is_made_without_being_shown():
    assert chosen(LADDER, ["again"]).rows == (Row("again", (), None, "BSL"),)
    assert needed(LED, ["more"]) == ["BSL", "again", "more"] and needed(LED, ["led"]) == ["BSL", "+DYN", "led"]


@pytest.mark.parametrize(("names", "said"), [(["BSL", "INF"], "must be some of base, BSL"), ([], "must be some")])
def test_rows_that_are_not_there_are_one_line(names, said):
    with pytest.raises(UserError, match="rows=.*" + re.escape(said)):
        chosen(LADDER, names)


def test_merged():
    given = merged(["a=1", "g/h=x", "+b=1"], ["g/h=y", "c=1"], ["~b", "a=2"])
    assert given == ["a=2", "g/h=y", "~b", "c=1"]
    assert key("+a.b=c=d") == "a.b"


def test_an_unknown_study_lists_what_there_is(run, work):
    write(work, "mine")
    status, _, errors = run(name="mien")
    assert status == 2 and len(errors) == 1
    assert errors[0].startswith("reflow-lab: study=mien: no such study; there are ") and {"mine", "quickstart"} <= set(
        re.findall(r"\w+", errors[0])
    )


def test_ones_own_study_comes_first(work):
    assert find("quickstart").parent != work / "experiments"
    assert find("quickstart") != write(work, "quickstart") == find("quickstart")


def test_reading(work):
    path = write(work, overrides=["seed=1"])
    rows = tuple(Row(row["name"], tuple(row["overrides"]), row.get("against")) for row in ROWS)
    assert read(path) == Study("A ladder", ("seed=1",), (1, 3), rows)


MALFORMED = {
    "not YAML": ("title: [", "not a study: while parsing"),
    "empty": ("", "not a study: the file has the keys []; it wants nfe, overrides, rows, title"),
    "a list": ("[1, 2]", "not a study: the file has the keys []"),
    "no title": ({"drop": "title"}, "the file has the keys ['nfe', 'overrides', 'rows']; it wants"),
    "misspelt key": ({"row": []}, "the file has the keys"),
    "misspelt key of a row": ({"rows": [{"name": "a", "overrides": [], "againts": "b"}]}, "a row has the keys"),
    "rows as text": ({"rows": ["a"]}, "must be a list of dict"),
    "overrides as text": (
        {"rows": [{"name": "a", "overrides": "dyn=baseline"}]},
        "must be a list of str",
    ),
    "overrides as a map": ({"overrides": {"dyn": "baseline"}}, "must be a list of str"),
    "nfe as text": ({"nfe": ["a"]}, "must be a list of int"),
    "nfe of 0": ({"nfe": [1, 0]}, "must be numbers of at least 1"),
    "no nfe": ({"nfe": []}, "must be numbers of at least 1"),
    "no rows": ({"rows": []}, "must be at least one"),
    "equal names": ({"rows": [ROWS[0], ROWS[0]]}, "names must differ"),
    "against nothing": ({"rows": [ROWS[0], {**ROWS[1], "against": "base"}]}, "BSL.against=base: must be one of base flow"),
    "taught by nobody": (
        {"rows": [{**ROWS[0], "teacher": "BSL"}, ROWS[1]]},
        "base flow.teacher=BSL: must be one of the rows before",
    ),
    "taught by itself": ({"rows": [ROWS[0], {**ROWS[1], "teacher": "BSL"}]}, "must be one of the rows before it: base flow"),
    "the first taught": ({"rows": [{**ROWS[0], "teacher": "x"}]}, "must be one of the rows before it: there are none"),
    "started from itself": (
        {"rows": [ROWS[0], {**ROWS[1], "start": "BSL"}]},
        "BSL.start=BSL: must be one of the rows before it: base flow",
    ),
    "against itself": ({"rows": [ROWS[0], {**ROWS[1], "against": "BSL"}]}, "BSL.against=BSL: must be one of base flow"),
}


@pytest.mark.parametrize("content, line", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_study_is_one_line(work, content, line):
    path = write(work) if isinstance(content, str) else write(work, **content)
    if isinstance(content, str):
        path.write_text(content)
    elif "drop" in content:
        raw = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({name: value for name, value in raw.items() if name not in ("drop", content["drop"])}))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert line in str(caught.value)


MISTAKES = {
    "nfe=4": ({}, "nfe=4: a study measures at the numbers of steps that its file lists"),
    "seeds=0": ({}, "seeds=0: must be a whole number"),
    "evaluation.num_images=9000": ({}, "evaluation.num_images=9000: the split reference has only 2000"),
    "evaluation.seed=1000": ({}, "evaluation.seed=1000: must differ"),
    "training.batch_size=0": ({}, "training.batch_size=0: must be"),
    "name=x": ({"rows": [*ROWS, {"name": "z", "overrides": ["evaluation.num_images=50"]}]}, "z: evaluation={"),
    "name=w": (
        {"rows": [*AGAIN[:2], {**AGAIN[2], "overrides": ["training.batch_size=400"]}]},
        "training.batch_size=400: takes 200 backward",
    ),
    "name=v": ({"rows": [*AGAIN[:2], {**AGAIN[2], "overrides": ["dyn/time=none"]}]}, "k = 3: dyn/time=none: no such member"),
    "name=y": ({"rows": [*ROWS, {"name": "z", "overrides": ["dyn/weight=none"]}]}, "z: dyn/weight=none: no such member"),
    "name=u": (
        {"rows": [*STAGES[:1], {"name": "wide", "overrides": ["net.network.width=48"], "start": "first"}]},
        "training.start=the row first: these weights belong to another network; net.network.width: 32 in the file, 48 here",
    ),
    "inf/grid=listed": ({}, "grid.times="),
    "inf/guidance=cfg": ({}, "inf.guidance=cfg: this flow is unconditional"),
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_are_found_before_any_training(run, work, forbid_training, word):
    changes, line = MISTAKES[word]
    write(work, **changes)
    forbid_training()
    status, _, errors = run(word)
    assert status == 2 and len(errors) == 1 and errors[0].startswith(f"reflow-lab: {line}")
    assert not Path("outputs").exists()


AFTER = (("again", "wide"), ("and again", "again"))


def test_a_row_may_have_the_network_of_the_row_that_teaches_it(toy, run, work):
    """Which is not the one of the study's teacher: the first row trains a wider one from scratch."""
    wide = ["net.network.width=48", "training.start=scratch"]
    rows = [{"name": "wide", "overrides": wide}, *({"name": n, "overrides": ["net=teacher"], "teacher": t} for n, t in AFTER)]
    write(work, overrides=SHORT, rows=rows, nfe=[1])
    words = [word for word in toy.words("outputs=outputs", "out=here") if not word.startswith("net")]
    assert cli.main(["study", "study=ladder", *words]) == 0
    runs = [files.find(cell["run"]) for cell in cells("here")]
    assert [files.describe(path)["net"]["network"]["width"] for path in runs] == [48, 48, 48]
    assert len({*runs}) == 3
