"""Weights & Biases by its real library, offline; what it wrote is read back from its files."""

import json
import os
import shutil
import socket
import struct
import time

import pytest
import wandb
from hydra.utils import instantiate
from PIL import Image
from wandb.proto import wandb_internal_pb2

from reflow_lab import tracking
from reflow_lab.artifacts import Artifact, digest, write_json
from reflow_lab.errors import UserError
from reflow_lab.evaluation.evaluate import evaluate
from reflow_lab.lrn.pairs import pairs
from reflow_lab.training import train as training
from reflow_lab.training.train import train
from tiny import IMAGES, composed
from toy import config, teacher_file

SMALL = ["logger=wandb", "training.batch_size=32", "training.num_heldout=16", "training.total_kimg=1.28"]
OFTEN = ["trainer.log_every_kimg=0.32", "trainer.diagnostics_every_kimg=0.64", "trainer.few_step_every_kimg=0.64"]
BASE = [
    *SMALL,
    *OFTEN,
    "dyn=baseline",
    "dyn/weight=velocity",
    "teacher=none",
    "training=base_flow",
    "lrn=base_flow",
    "training.ema_halflives_mimg=[0.001]",
]
STEPS, BATCH = 40, 32


def whole(path):
    """The records of an offline file; W&B's service writes the last ones when the run has ended for us."""
    for _ in range(100):
        found = list(records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def records(data):
    """The records of a log in LevelDB's format: a header, then blocks of 32 KiB of fragments, each with a header of 7 bytes."""
    position, found = 7, b""
    while len(data) - position >= 7:
        left = 32768 - position % 32768
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7]) if left >= 7 else (0, 0)
        if kind == 0:
            position += left
            continue
        found += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield wandb_internal_pb2.Record.FromString(found)
            found = b""


def items(updates):
    """Keys, nested ones joined by dots, and values of a configuration, a summary or a row."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


class Offline:
    """What one offline file of a run says."""

    def __init__(self, path):
        self.folder, self.records = path.parent, whole(path)
        self.run = self.all("run")[-1]
        self.config = items(update for record in (self.run.config, *self.all("config")) for update in record.update)
        self.rows = [items(row.item) for row in self.all("history")]
        self.summary = items(update for record in self.all("summary") for update in record.update)
        self.artifacts = {found.name: found for found in self.all("artifact")}

    def all(self, kind):
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    def values(self, name):
        return [row[name] for row in self.rows if name in row]


def files_of(outputs, key):
    """The offline files of a run, the oldest first."""
    return [Offline(path) for path in sorted(outputs.glob(f"wandb/offline-run-*-{key}*/run-{key}.wandb"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tracked training, to look at."""
    outputs = tmp_path_factory.mktemp("outputs")
    return train(config("train", outputs, *BASE, "name=BSL seed 0", "logger.group=ladder", "logger.tags=[mine]"))


def test_a_training_as_users_expect_it(base):
    (found,) = files_of(base.parents[1], base.name)
    run = found.run
    assert (run.run_id, run.display_name, run.job_type, run.project) == (base.name, "BSL seed 0", "train", "simple_reflow")
    assert run.run_group == "ladder" and [*run.tags] == ["grid", "solver", "inf", "gaussian", "mine"]
    assert found.config["training"]["batch_size"] == BATCH and found.config["dyn"]["weight"]["_target_"].startswith("reflow_lab.")
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in found.all("metric")}
    assert axes["*"] == "images_seen"
    assert found.values("_step") == sorted(set(found.values("_step"))) and found.rows[-1]["_step"] == STEPS
    assert all(row["images_seen"] == row["_step"] * BATCH for row in found.rows)
    lines = [json.loads(line) for line in base.joinpath("metrics.jsonl").read_text().splitlines()]
    assert found.values("loss") == [line["loss"] for line in lines if "loss" in line]
    assert found.summary["kimg"] == 1.28 and json.loads(base.joinpath("lineage.json").read_text())["type"] == "model"


def test_the_run_folder_stays_whole_and_the_next_run_is_its_own(tmp_path, base):
    assert Artifact(base, {}).is_done()
    other = train(config("train", tmp_path, *BASE, "seed=1", "logger.upload=[]"))
    (found,) = files_of(tmp_path, other.name)
    assert other != base and found.run.display_name == "base flow, seed 1" and len(files_of(base.parents[1], base.name)) == 1
    paths = [entry.path for entry in found.artifacts[f"train-{other.name}"].manifest.contents]
    assert "recipe.json" in paths and not [path for path in paths if path.startswith("weights")]


def test_weights_are_an_artifact_that_names_what_it_is_made_of(base):
    (found,) = files_of(base.parents[1], base.name)
    model = found.artifacts[f"train-{base.name}"]
    paths = {entry.path for entry in model.manifest.contents}
    assert {"weights/raw.safetensors", "weights/ema0.001.safetensors", "config.yaml", "lineage.json"} <= paths
    assert model.type == "model" and json.loads(model.metadata)["uses"][0]["type"] == "data"


class Accident(Exception):
    pass


def interrupted(cfg, at, monkeypatch):
    """A training that a crash ends after a step, with a checkpoint a little before."""
    step = training.FlowModule.training_step

    def crash(module, *args):
        if module.global_step == at:
            raise Accident
        return step(module, *args)

    with monkeypatch.context() as patch, pytest.raises(Accident):
        patch.setattr(training.FlowModule, "training_step", crash)
        train(cfg)


def test_the_id_is_on_the_disk_and_a_resumed_run_is_one_whole(tmp_path, base, monkeypatch):
    """Of two offline files the server keeps the one that is synced last, so it must hold what the first one did."""
    outputs = tmp_path / "again"
    cfg = config("train", outputs, *BASE, "trainer.checkpoint_every_s=0")
    interrupted(cfg, 25, monkeypatch)
    (key,) = [path.parent.name for path in outputs.glob("tracking/*/run.json")]
    train(cfg)
    first, second = files_of(outputs, key)
    assert first.run.run_id == second.run.run_id == key == base.name
    assert first.rows[-1]["_step"] < STEPS and [row["_step"] for row in first.rows] == [
        row["_step"] for row in second.rows[: len(first.rows)]
    ]
    (undisturbed,) = files_of(base.parents[1], base.name)
    rows = [
        [{k: v for k, v in row.items() if k[0] != "_" and k != "images_per_s"} for row in f.rows] for f in (second, undisturbed)
    ]
    assert rows[0] == rows[1]


def test_pictures_of_the_same_noise_survive_a_resume(tmp_path, monkeypatch):
    words = [
        "experiment=quickstart_base",
        "trainer=cpu",
        *IMAGES,
        "debug=tiny",
        "logger=wandb",
        *OFTEN[-1:],
        f"outputs={tmp_path}",
    ]
    small = ["training.batch_size=8", "training.num_heldout=4", "training.total_kimg=0.064", "nfe=2"]
    cfg = composed("train", *words, *small, "trainer.few_step_every_kimg=0.032", "trainer.checkpoint_every_s=0")
    interrupted(cfg, 6, monkeypatch)
    folder = train(cfg)
    found = files_of(tmp_path, folder.name)[-1]
    key = "few_step/nfe2/samples"
    shown = [row["_step"] for row in found.rows if f"{key}._type" in row or key in row]
    assert shown == [4, 8] and len(list(found.folder.rglob("*.png"))) == 2
    kept = tmp_path / "tracking" / folder.name / "pictures" / key
    assert sorted(path.stem for path in kept.glob("*.png")) == ["000000004", "000000008"]
    assert (Image.open(kept / "000000008.png").size) == Image.open(folder / "few_step.png").size


def cell(nfe, value, folder):
    about = {"protocol": {"nfe": nfe}, "distance": "fd_lite0", "scores": ["kid"], "folder": str(folder)}
    metrics = {"fd_lite0": value, "fd_lite0_teacher": value / 2, "paired_rmse": 0.1, "kid": 0.3, "straightness": 0.2}
    intervals = {name: [metrics[name] - 1, metrics[name] + 1] for name in ("fd_lite0", "fd_lite0_teacher", "paired_rmse")}
    return {**about, **metrics, "ms_per_image": 7.0, "intervals": intervals}


def test_evaluations_add_to_the_run_of_the_training(tmp_path, base):
    """Called twice, as two processes would: the later file has both, and all of the training."""
    base = shutil.copytree(base.parents[1], tmp_path, dirs_exist_ok=True) / "train" / base.name
    cfg = config("evaluate", tmp_path, "logger=wandb", "teacher=none")
    tracking.evaluated(cfg, base, [cell(1, 30.0, tmp_path), cell(9, 10.0, tmp_path)])
    tracking.evaluated(cfg, base / "weights" / "raw.safetensors", [cell(4, 20.0, tmp_path), cell(9, 9.0, tmp_path)])
    tracking.evaluated(cfg, base, [cell(9, 9.0, tmp_path)])  # known already
    training_run, _, found = files_of(tmp_path, base.name)
    expected = {"fd_lite0/nfe1": 30, "fd_lite0/nfe4": 20, "fd_lite0/nfe9": 9, "fd_lite0_teacher/nfe9": 4.5, "kid/nfe4": 0.3}
    assert {key: found.summary[key] for key in expected} == expected and found.summary["kimg"] == 1.28
    assert found.run.display_name == "BSL seed 0" and found.run.run_group == "ladder" and found.run.job_type == "train"
    assert [*found.run.tags] == [*training_run.run.tags]
    assert [row["loss"] for row in found.rows if "loss" in row] == training_run.values("loss")
    assert found.rows[-1]["images_seen"] == STEPS * BATCH
    (table,) = [json.loads(p.read_text()) for p in found.folder.rglob("*.table.json") if "quality/fd_lite0_table" in str(p)]
    assert table["columns"] == ["nfe", "fd_lite0", "low", "high"]
    assert table["data"] == [[1, 30, 29, 31], [4, 20, 19, 21], [9, 9, 8, 10]]


def test_another_sampler_has_a_run_of_its_own(tmp_path, base):
    """Whose numbers do not mix with those of the sampler that the training names."""
    base = shutil.copytree(base.parents[1], tmp_path, dirs_exist_ok=True) / "train" / base.name
    before = {path.name for path in (tmp_path / "wandb").glob("offline-run-*")}
    for solver, value in (("dpm", 10.0), ("euler", 20.0), ("heun", 30.0)):
        cfg = config("evaluate", tmp_path, "logger=wandb", "teacher=none", f"inf/solver={solver}")
        with tracking.making(study="ladder", row=solver):
            tracking.evaluated(cfg, base, [cell(9, value, tmp_path)])
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*") if path.name not in before]
    found = {name.split("-")[3]: files_of(tmp_path, name.split("-")[3])[-1] for name in folders}
    values = {f.run.display_name: (f.run.job_type, f.summary["fd_lite0/nfe9"], f.run.run_group) for f in found.values()}
    assert values == {
        "BSL seed 0": ("train", 10, "ladder"),
        "euler": ("evaluate", 20, "ladder"),
        "heun": ("evaluate", 30, "ladder"),
    }
    assert len({f.run.run_id for f in found.values()}) == 3 and base.name in found


def test_the_verb_evaluate_adds_too(toy):
    """The training itself was not tracked: its run is made from its folder."""
    metrics = evaluate(toy.config("evaluate", f"run={toy.teacher}", "nfe=2", "logger=wandb"))
    found = files_of(toy.outputs, toy.teacher.name)[-1]
    assert found.summary[f"{metrics['distance']}/nfe2"] == pytest.approx(metrics[metrics["distance"]])
    assert found.run.job_type == "train" and found.values("loss") and Artifact(toy.teacher, {}).is_done()


def test_samples_of_an_evaluation_are_a_grid(tmp_path):
    import numpy as np

    np.save(tmp_path / "samples.npy", np.full((70, 1, 4, 4), 200, dtype=np.uint8))
    found = tracking.samples({"folder": str(tmp_path)})
    assert found is not None and found.size == (32, 32) and found.getextrema() == (200, 200)
    np.save(tmp_path / "samples.npy", np.zeros((70, 2)))
    assert tracking.samples({"folder": str(tmp_path)}) is None


def test_weights_of_no_run_are_said_to_be_left_out(tmp_path, capsys):
    weights = teacher_file(tmp_path / "teacher.safetensors")
    tracking.evaluated(config("evaluate", tmp_path, "logger=wandb", "teacher=none"), weights, [cell(1, 1.0, tmp_path)])
    assert "belongs to no training run" in capsys.readouterr().err and not list(tmp_path.glob("wandb/*"))


@pytest.fixture
def student(tmp_path):
    """A ReFlow from a teacher's file, in the group of a study."""
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    words = [
        f"teacher.path={teacher}",
        "teacher=run",
        *SMALL,
        *OFTEN,
        "training.total_kimg=0.32",
        "training.ema_halflives_mimg=[1]",
    ]
    cfg = config("train", tmp_path, *words, "lrn=improved", "dyn=improved", "dyn/metric=squared_error", "logger.upload=[pairs]")
    with tracking.making(study="simple_reflow/ladder", row="+LRN", experiment="quickstart"):
        folder = train(cfg)
    return folder, cfg


def test_pair_stores_are_artifacts_with_a_run_of_their_own(tmp_path, student):
    _, cfg = student
    recipes = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("pairs/*/recipe.json")}
    assert {recipe["kind"] for recipe in recipes.values()} == {"backward", "forward"}
    for key, recipe in recipes.items():
        (found,) = files_of(tmp_path, key)
        assert found.run.job_type == "pairs" and found.run.display_name == f"{recipe['kind']} pairs"
        store = found.artifacts[f"pairs-{key}"]
        paths = {entry.path for entry in store.manifest.contents}
        assert "manifest.json" in paths and "shard-00000.npy" in paths and json.loads(store.metadata)["kind"] == recipe["kind"]
    cfg.pairs.kind = "backward"
    pairs(cfg)
    assert all(len(files_of(tmp_path, key)) == 1 for key in recipes), "logged once"


def test_what_a_study_says_of_a_row(tmp_path, student):
    folder, _ = student
    (found,) = files_of(tmp_path, folder.name)
    assert found.run.run_group == "simple_reflow/ladder" and found.run.display_name == "+LRN"
    assert {"weight", "time", "dropout", "coupling", "lrn", "grid", "solver", "inf"} <= {*found.run.tags}
    assert "metric" not in found.run.tags and "dyn" not in found.run.tags


def test_a_run_that_two_studies_share_stays_the_first_ones(tmp_path, student):
    """Whether the second one measures it, or goes on with its training."""
    folder, cfg = student
    with tracking.making(study="another", row="BSL", experiment="cifar10"):
        tracking.evaluated(cfg, folder, [cell(9, 9.0, tmp_path)])
        found = files_of(tmp_path, folder.name)[-1]
        assert found.summary["fd_lite0/nfe9"] == 9
        assert (found.run.run_group, found.run.display_name) == ("simple_reflow/ladder", "+LRN")
        made = Artifact(folder, json.loads((folder / "recipe.json").read_text()))
        assert tracking.lineage(made, None)["made_by"]["study"] == "simple_reflow/ladder"


def test_lineage_is_in_the_folder_with_any_logger(tmp_path, student):
    folder, _ = student
    found = json.loads(folder.joinpath("lineage.json").read_text())
    inputs = json.loads(folder.joinpath("recipe.json").read_text())["inputs"]
    assert found["made_by"] == {"study": "simple_reflow/ladder", "row": "+LRN", "experiment": "quickstart"}
    used = {item.get("drawn", item["type"]): item for item in found["uses"]}
    assert (
        used["backward"]["name"] == f"pairs-{inputs['pairs']['backward']}"
        and used["forward"]["hash"] == inputs["pairs"]["forward"]
    )
    assert used["model"] == {"type": "model", "name": None, "hash": inputs["start"]} and used["data"]["hash"] == inputs["data"]
    quiet = config("train", tmp_path, *BASE, "logger=none")
    assert json.loads((train(quiet) / "lineage.json").read_text())["uses"] == [used["data"]]
    assert "lineage.json" in json.loads((folder / "done.json").read_text())["files"]
    assert tracking.model_name(folder / "weights" / "raw.safetensors") == f"train-{folder.name}"


def test_a_studys_table(tmp_path):
    cells = [{"name": "BSL", "seed": 1, "nfe": n, "fd_lite0": 10.0 / n, "training": {"kimg": 2}, "intervals": {}} for n in (1, 9)]
    estimate = {"name": "BSL", "nfe": 9, "metric": "fd_lite0", "low": None, "high": None}
    table = {"study": "my/ladder", "command": "make", "seeds": [1], "nfe": [1, 9], "metric": "fd_lite0", "sha256": "ab"}
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "table.json", table)
    Image.new("L", (4, 4)).save(out / "samples.png")
    cfg = config("train", tmp_path, "logger=wandb", "teacher=none")
    for value in (1.3, 1.1, 1.1):
        tracking.study_table(cfg, out, table | {"cells": cells, "estimates": [estimate | {"value": value}], "effects": []})
    first, second = files_of(tmp_path, digest(["study", "my/ladder", str(out)]))
    assert first.run.run_id == second.run.run_id and second.run.run_group == "my/ladder" and second.run.job_type == "study"
    assert second.summary["BSL/fd_lite0/nfe9"] == 1.1 and list(second.folder.rglob("samples_*.png"))
    (logged,) = [json.loads(p.read_text()) for p in second.folder.rglob("cells_*.table.json")]
    assert logged["columns"] == ["name", "seed", "nfe", "fd_lite0", "training_kimg"]
    assert logged["data"] == [["BSL", 1, 1, 10.0, 2], ["BSL", 1, 9, 10 / 9, 2]]
    (files,) = [found for name, found in second.artifacts.items() if name.startswith("study-")]
    assert {entry.path for entry in files.manifest.contents} == {"table.json", "samples.png"}


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A process that has not used W&B yet, of a user who never logged in."""
    wandb.teardown()  # first: it takes its service's address out of the environment, which is put back as it is now
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(tracking, "_GIVEN_UP", [])
    tracking._say.cache_clear()
    yield monkeypatch
    wandb.teardown()


@pytest.fixture(params=["refuses", pytest.param("hangs", marks=pytest.mark.slow)])
def dead_server(request):
    """An address where nobody listens, or somebody who never answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            found.listen(50)
        yield f"http://127.0.0.1:{found.getsockname()[1]}"


def test_a_server_that_cannot_be_reached_is_one_warning(tmp_path, newcomer, dead_server, capfd):
    """The training and the pairs before it each have a run: the second does not wait again."""
    newcomer.setenv("WANDB_BASE_URL", dead_server)
    newcomer.setenv("WANDB_API_KEY", "0" * 40)
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    words = ["dyn=baseline", "lrn=baseline", "teacher=run", f"teacher.path={teacher}", "logger.timeout_s=1"]
    folder = train(config("train", tmp_path, *SMALL, *OFTEN, *words, "training.total_kimg=0.32"))
    assert capfd.readouterr().err.count("going on offline") == 1
    assert folder.joinpath("done.json").exists() and files_of(tmp_path, folder.name)[0].rows[-1]["_step"] == 10
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2 and len(list(tmp_path.glob("wandb/run-*"))) <= 1


def test_without_a_key_nobody_is_asked(tmp_path, newcomer, capfd):
    newcomer.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = train(config("train", tmp_path, *BASE, "logger.offline=false"))
    said = capfd.readouterr()
    assert said.err.count("no API key") == 1 and len(files_of(tmp_path, folder.name)) == 1
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-{folder.name}*" in said.out


def test_a_malformed_key_is_one_warning(newcomer, capfd):
    newcomer.setenv("WANDB_API_KEY", "?")
    assert not tracking.is_online(tracking.WandB("p")) and not tracking.is_online(tracking.WandB("p"))
    assert capfd.readouterr().err.count("going on offline") == 1


def test_what_is_wanted_online(tmp_path, newcomer):
    newcomer.setattr(tracking, "require_answer", lambda *_: None)
    tmp_path.joinpath("netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    assert tracking.is_online(tracking.WandB("p")) and not tracking.is_online(tracking.WandB("p", offline=True))
    newcomer.setenv("WANDB_MODE", "offline")
    assert not tracking.is_online(tracking.WandB("p"))


def test_no_run_in_other_processes_or_where_wandb_is_disabled(tmp_path, monkeypatch):
    cfg = config("train", tmp_path, "logger=wandb", "teacher=none")
    assert tracking.chosen(cfg) == instantiate(cfg.logger, _convert_="all")
    assert tracking.chosen(config("train", tmp_path, "teacher=none")) is None
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert tracking.chosen(cfg) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(config("train", tmp_path, *BASE))
    assert not list(tmp_path.glob("wandb/*"))


def test_a_logger_of_lightnings(tmp_path):
    words = ["logger._target_=lightning.pytorch.loggers.CSVLogger", f"+logger.save_dir={tmp_path}/csv", "logger.name=x"]
    own = [word.replace("logger=wandb", "logger=none") for word in BASE]
    folder = train(config("train", tmp_path, *own, words[0], words[1]))
    logged = (next(tmp_path.glob("csv/**/metrics.csv"))).read_text()
    assert "loss" in logged.splitlines()[0] and folder.exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("logger.upload=[everything]", "logger.upload=['everything']: must be some of weights, pairs"),
        ("logger.timeout_s=0", "logger.timeout_s=0: must be a positive number"),
        ("logger.project=''", "logger.project="),
        ("logger.project=a/b", "logger: "),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path, override, says):
    from reflow_lab.hydra_errors import explain

    with pytest.raises(Exception) as error:
        train(config("train", tmp_path, *BASE, override))
    line = explain(error.value, "train") or ""
    assert says in line and "\n" not in line and not list(tmp_path.glob("train/*/done.json"))
    assert isinstance(error.value.__cause__ or error.value, UserError)


def test_images_seen_by_rows(tmp_path):
    """A step that the server has is not told again, neither by a replay nor by the logger."""
    from reflow_lab.training.loggers import RunLogger

    class Resumed:
        id, starting_step = "x", 5

        def __init__(self):
            self.rows = []

        def log(self, row, step):
            self.rows.append((step, row))

    folder = tmp_path / "train" / "x"
    folder.mkdir(parents=True)
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in (2, 4, 6, 6)))
    run = Resumed()
    tracking.replay(run, folder, 10)
    logger = RunLogger(run, tmp_path, 10)
    for step in (4, 8):
        logger.log_metrics({"loss": step}, step)
    assert run.rows == [(6, {"loss": 6, "images_seen": 60}), (8, {"loss": 8, "images_seen": 80})]
