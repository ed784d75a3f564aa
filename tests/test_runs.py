import copy
import functools
import json
import subprocess
import sys

import pytest
import yaml

from reflow_lab import runs
from reflow_lab.artifacts import lock, write_json
from reflow_lab.errors import UserError
from reflow_lab.paths import conf_dir
from tiny import composed

IMPROVED = ["weight", "time", "metric", "dropout", "coupling", "grid", "solver"]


@functools.cache
def config(*overrides):
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(composed("train", "scale=mini", *overrides), resolve=True)
    assert isinstance(found, dict)
    return found


def made(outputs, key, overrides=(), lines=(), done=True, made_by=None):
    """A run's folder as training leaves it, but for the weights, which are 16 characters of their checksum."""
    folder = outputs / "train" / key
    folder.mkdir(parents=True)
    folder.joinpath("config.yaml").write_text(yaml.safe_dump(config(*overrides)))
    write_json(folder / "recipe.json", {"stage": "train"})
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in lines))
    if made_by is not None:
        write_json(folder / "lineage.json", {"made_by": made_by})
    if done:
        write_json(folder / "done.json", {"key": key, "files": {"weights/ema.safetensors": [1, f"hash of {key}".ljust(64, ".")]}})
    return folder


def cell(outputs, key, nfe, value, name="cell", **more):
    folder = outputs / "evaluate" / f"{name}{key}{nfe}"
    folder.mkdir(parents=True)
    by = {"weights": f"hash of {key}".ljust(64, ".")[:16], "nfe": nfe, "grid": [0.9, 0.0], "solver": {"_target_": "a.b.Heun"}}
    metrics = {"fd_lite0": 9.0, "fd_lite0_teacher": value, "intervals": {"fd_lite0_teacher": [0, 1]}, "num_images": 9}
    write_json(folder / "metrics.json", {"protocol": by, "distance": "fd_lite0", **metrics, **more})
    return folder


@pytest.fixture
def outputs(tmp_path):
    made(
        tmp_path,
        "a",
        ["data=two_moons", "net=mlp", "dyn=baseline", "lrn=baseline", "inf=baseline", "name=BSL", "training.total_kimg=30"],
        lines=[7, 9],
    )
    made(
        tmp_path,
        "b",
        ["dyn=improved", "lrn=baseline", "name='+DYN'", "seed=3"],
        made_by={"experiment": "quickstart", "study": "my/ladder"},
    )
    for key, nfe, value in (("a", 1, 5.0), ("a", 9, 3.0), ("b", 9, 2.0)):
        cell(tmp_path, key, nfe, value)
    return tmp_path


def listed(capsys, *words):
    runs.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dyn=baseline", "lrn=baseline", "inf=baseline"], []),
        (["dyn=improved", "lrn=improved", "inf=improved"], IMPROVED),
        (["dyn=improved", "lrn=baseline", "inf=baseline", "dyn/time=uniform"], ["weight", "metric"]),
        (["dyn=baseline", "lrn=baseline", "inf=baseline", "dyn/weight=edm"], []),
        (["dyn=baseline", "lrn=baseline", "inf=baseline", "dyn/weight=learned_normalisation"], ["weight"]),
        (["dyn=improved", "lrn=baseline", "inf=baseline", "dyn.metric.lam_hpf=0"], ["weight", "time"]),
        (["dyn=baseline", "lrn=baseline", "inf=baseline", "lrn/dropout=none", "lrn/coupling=projected"], ["dropout", "coupling"]),
        (["dyn=baseline", "lrn=base_flow", "inf=improved", "inf.grid.kappa=0"], ["solver"]),
        (["dyn=baseline", "lrn=baseline", "inf=auto"], ["grid", "solver"]),
    ],
)
def test_improvements_are_those_that_the_members_are(overrides, expected):
    assert runs.improvements(config(*overrides)) == expected


def test_tags_name_whole_stages_and_the_data():
    found = runs.tags(config("dyn=improved", "lrn=baseline", "inf=baseline"))
    assert found == ["weight", "time", "metric", "dyn", "fashion_mnist"]


def test_data_bear_the_name_that_the_command_line_has():
    assert runs.data_name({"data": {"_target_": "x.Archive", "path": "data/ffhq-64x64.zip"}}) == "ffhq-64x64"
    assert runs.data_name({"data": {"_target_": "x.Folder", "path": "my_images"}}) == "my_images"
    for name in ("two_moons", "fashion_mnist", "cifar10", "checkerboard", "gaussian"):
        assert runs.data_name({"data": yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text())}) == name


def test_a_users_own_member_is_no_improvement():
    own = copy.deepcopy(config("dyn=baseline", "lrn=baseline", "inf=baseline"))
    own["lrn"]["dropout"] = {"_target_": "mine.Dropout"}
    own["dyn"]["weight"] = "nonsense"
    assert runs.improvements(own) == []


def test_what_a_run_is():
    assert runs.what(config("lrn=base_flow", "training=base_flow")) == "base flow"
    assert runs.what(config("lrn=base_flow", "lrn/coupling=minibatch_ot")) == "base flow"
    assert runs.what(config()) == runs.what(config("lrn/coupling=online")) == "ReFlow"
    assert runs.what(config("training.total_kimg=0")) == "untrained"


def test_a_flow_map_is_called_one_and_has_no_dynamics():
    words = ["training=flow_map", "lrn=flow_map", "inf=improved"]
    for preset, kind in {"ayf": "flow map", "meanflow": "flow map", "consistency": "consistency model"}.items():
        assert runs.what(config(f"flow_map={preset}", *words)) == kind
    assert runs.what(config("flow_map=ayf", "flow_map/adversarial=stylegan2", *words)) == "adversarial flow map"
    assert runs.title(config("flow_map=ayf", "dyn=improved", *words)) == "flow map dropout+grid+solver, seed 0"


def test_a_run_without_a_name_is_named_after_what_is_on():
    assert runs.title(config("lrn=base_flow", "training=base_flow", "seed=4")) == "base flow, seed 4"
    assert runs.title(config("dyn=baseline", "lrn=baseline", "inf=baseline")) == "ReFlow baseline, seed 0"
    assert runs.title(config("dyn=improved", "lrn=baseline", "inf=baseline")) == "ReFlow weight+time+metric, seed 0"


def test_runs_with_their_distances(outputs, capsys):
    first, second = sorted(listed(capsys, outputs), key=lambda run: run["key"])
    about = [first[key] for key in ("name", "what", "state", "improvements")]
    assert about == ["BSL", "ReFlow", "done", []]
    assert first["images"] == 30_000 and [c["value"] for c in first["evaluations"]] == [5.0, 3.0]
    assert {"weight", "time", "metric", "dyn"} <= {*second["tags"]} and second["made_by"]["study"] == "my/ladder"


def test_the_table(outputs, capsys):
    cell(outputs, "a", 9, 2.5, name="another")
    runs.main([str(outputs), "--sort", "nfe9"])
    head, first, second, *notes = capsys.readouterr().out.splitlines()
    assert head.split() == ["key", "name", "what", "data", "on", "images", "state", "1", "NFE", "9", "NFE"]
    assert first.split()[0] == "b" and first.split()[-1] == "2" and second.split()[-3:] == ["5", "2.5", "(2)"]
    assert "fd_lite0_teacher of N = 9 samples, lower is better" in notes[0] and "lowest of n" in notes[1]


def test_distances_of_other_numbers_of_samples_stand_in_columns_of_their_own(outputs, capsys):
    """The lower distance of the larger N is not the better one: rows are sorted within one N, the largest first."""
    cell(outputs, "a", 9, 0.5, name="larger", num_images=1000)
    cell(
        outputs, "b", 1, 7.0, name="points", num_images=1000, distance="fd_points", fd_points=7.0, intervals={"fd_points": [6, 8]}
    )
    runs.main([str(outputs), "--sort", "nfe9"])
    head, first, second, note = capsys.readouterr().out.splitlines()
    columns = [
        "9 NFE fd_lite0_teacher N=1000",
        "1 NFE fd_lite0_teacher N=9",
        "9 NFE fd_lite0_teacher N=9",
        "1 NFE fd_points N=1000",
    ]
    assert [head.index(column) for column in columns] == sorted(head.index(column) for column in columns)
    assert first.split()[-3:] == ["0.5", "5", "3"] and second.split()[-2:] == ["2", "7"] and second.split()[0] == "b"
    assert "fd_points of N = 1,000 samples" in note and "compare within a column only" in note


def test_the_study_that_began_a_run_names_it(tmp_path, capsys):
    """Another one that shares it and goes on with it writes its own name into the configuration."""
    made(tmp_path, "c", ["name='other seed 3'", "seed=3"], made_by={"study": "ladder", "row": "+DYN"})
    assert listed(capsys, tmp_path)[0]["name"] == "+DYN seed 3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tag", "dyn"], ["b"]),
        (["--tag", "weight", "--tag", "coupling"], []),
        (["--tag", "fashion_mnist"], ["b"]),
        (["--tag", "two_moons"], ["a"]),
        (["--tag", "quickstart"], ["b"]),
        (["--where", "seed=3"], ["b"]),
        (["--where", "dyn.time=Cosh"], ["a"]),
        (["--where", "training.start=teacher", "--where", "name=BSL"], ["a"]),
        (["--experiment", "quickstart"], ["b"]),
        (["--study", "my/ladder"], ["b"]),
        (["--study", "ladder"], []),
    ],
)
def test_filters(outputs, capsys, words, expected):
    assert sorted(run["key"] for run in listed(capsys, outputs, *words)) == expected


def test_nothing_fits(outputs, capsys):
    runs.main([str(outputs), "--where", "seed=77"])
    assert capsys.readouterr().out == "no runs\n"


def test_states(tmp_path, capsys):
    """Cut short in the middle of a line, as a kill leaves it; and with its lock held."""
    folder = made(tmp_path, "c", lines=[3, 5], done=False)
    with folder.joinpath("metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (run,) = listed(capsys, tmp_path)
    batch = config()["training"]["batch_size"]
    assert run["state"] == "unfinished at step 5" and run["images"] == 5 * batch
    with lock(folder / ".lock"):
        assert listed(capsys, tmp_path)[0]["state"] == "being trained"


def test_a_damaged_folder_is_left_out_and_said_so(outputs, capsys):
    outputs.joinpath("train/a/config.yaml").write_text("a: [")
    outputs.joinpath("evaluate/cellb9/metrics.json").write_text("{")
    runs.main([str(outputs), "--json"])
    said = capsys.readouterr()
    (run,) = json.loads(said.out)
    assert run["key"] == "b" and run["evaluations"] == [] and said.err.count("left out") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "OUTPUTS=nowhere: no such folder"),
        (["--where", "seed"], "--where=seed: must be key=value"),
        (["--where", "sede=1"], "--where=sede=1: no run has that key"),
        (["--tag", "three_moons"], "--tag=three_moons: must be one of weight, time, metric"),
        (["--sort", "best"], "--sort=best: must be one of"),
        (["--bad"], "unrecognized arguments: --bad"),
    ],
)
def test_what_a_user_can_get_wrong(outputs, monkeypatch, words, says):
    monkeypatch.chdir(outputs)
    outputs.joinpath("outputs").symlink_to(outputs)
    with pytest.raises(UserError) as error:
        runs.main(words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_it_starts_without_torch():
    code = "import sys; from reflow_lab import runs; print([m for m in ('torch', 'hydra', 'wandb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_real_run(toy, capsys):
    """As training and evaluation write them."""
    from reflow_lab.evaluation.evaluate import evaluate

    metrics = evaluate(toy.config("evaluate", f"run={toy.teacher}", "nfe=4"))
    capsys.readouterr()
    (run,) = [run for run in listed(capsys, toy.outputs) if run["key"] == toy.teacher.name]
    assert run["what"] == "base flow" and run["state"] == "done" and run["images"] == 195 * 256
    values = [c["value"] for c in run["evaluations"] if c["nfe"] == 4]
    assert metrics[f"{metrics['distance']}_teacher"] in values
