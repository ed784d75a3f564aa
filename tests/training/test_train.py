"""Training end to end on points: from a command to weights, through every kind of accident."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from reflow_lab import parts
from reflow_lab.artifacts import Artifact
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX, interpolate
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import Euler, Heun
from reflow_lab.networks import files
from reflow_lab.noise import normal
from reflow_lab.training import train as training
from reflow_lab.training.lifecycle import JSONLines
from reflow_lab.training.module import FlowModule
from reflow_lab.training.train import train
from toy import SMALL, config, teacher_file

QUICK = [
    "dyn/weight=velocity",
    "dyn/time=uniform",
    "dyn/metric=squared_error",
    "training.batch_size=32",
    "training.num_heldout=16",
    "training.warmup_kimg=0.32",
    "trainer.log_every_kimg=0.32",
    "trainer.diagnostics_every_kimg=0.64",
]
BASE = [
    *["teacher=none", "training=base_flow", "lrn=base_flow", "net.network.dropout=0.1", "training.total_kimg=1.28"],
    "training.ema_halflives_mimg=[0.0005,0.002]",
    *QUICK,
]
STEPS, STOP = 40, 23


def outcome(folder):
    """What must not depend on accidents: weights, averages, metrics without timings."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {p.name: p.read_bytes() for p in (folder / "weights").iterdir()}
    return weights, [{k: v for k, v in line.items() if k != "images_per_s"} for line in metrics]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)
    return train(config("train", tmp_path_factory.mktemp("undisturbed"), *BASE))


def test_a_run_leaves_weights_averages_metrics_and_its_configuration(undisturbed):
    weights, metrics = outcome(undisturbed)
    assert set(weights) == {"raw.safetensors", "ema0.0005.safetensors", "ema0.002.safetensors"}
    assert len(set(weights.values())) == 3
    assert [line["step"] for line in metrics if "loss" in line] == [10, 20, 30, 40]
    assert [line["kimg"] for line in metrics if "loss" in line] == pytest.approx([0.32, 0.64, 0.96, 1.28])
    assert [line["step"] for line in metrics if "heldout_loss" in line] == [20, 40]
    assert all(f"by_time/t0.{i:03d}/gradient_max" in metrics[2] or "loss" in metrics[2] for i in (62, 938))
    assert {p.name for p in undisturbed.iterdir()} >= {"config.yaml", "recipe.json", "version.json", "done.json"}
    assert not (undisturbed / "last.ckpt").exists()
    description = files.describe(files.find(undisturbed))
    assert description["profile"] == "ema0.002" and description["shape"] == [2] and description["t_max"] == T_MAX
    assert OmegaConf.load(undisturbed / "config.yaml").training.total_kimg == 1.28


def test_a_repeated_command_returns_at_once(undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(training, "fit", None)
    outputs = undisturbed.parents[1]
    assert train(config("train", outputs, *BASE)) == undisturbed
    assert str(undisturbed) in capsys.readouterr().out
    unchanged = ("trainer.log_every_kimg=7", "name=other", "nfe=3", "trainer.checkpoint_every_s=1")
    assert train(config("train", outputs, *BASE, *unchanged)) == undisturbed


def test_what_changes_the_weights_changes_the_folder(undisturbed):
    outputs, changes = undisturbed.parents[1], ["seed=1", "training.lr=1e-4", "data.std=0.4", "net.sigma_data=0.4", "t_max=0.9"]
    assert len({training.plan(config("train", outputs, *BASE, change)).key for change in changes} | {undisturbed.name}) == 6


def test_a_run_edited_by_hand_is_named(tmp_path):
    folder = train(config("train", tmp_path, *BASE, "training.total_kimg=0"))
    path = folder / "weights" / "raw.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: is missing or was changed"):
        train(config("train", tmp_path, *BASE, "training.total_kimg=0"))


def test_training_approaches_the_closed_form(tmp_path):
    cfg = config("train", tmp_path, *BASE, "data.mean=[1.0,-1.0]", "training.total_kimg=12.8", "training.lr=1e-2")
    exact = parts.data_source(cfg).closed_form(torch.float32)
    x0, x1 = exact.mean + exact.std * torch.randn(2000, 2), torch.randn(2000, 2)
    t = torch.linspace(0.02, 0.98, 2000)
    x_t = interpolate(x0, x1, t)

    def miss(velocity):
        return (velocity.eval()(x_t, t) - exact(x_t, t)).square().mean().sqrt().item()

    with torch.no_grad():
        assert miss(files.load(files.find(train(cfg)))) < 0.25 * miss(training.start(cfg))


def watch_weights(monkeypatch, act):
    """Call act(module) at the start of every step."""
    step = FlowModule.training_step

    def training_step(self, batch, batch_idx):
        act(self)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", training_step)


def test_averages_equal_the_recursion_over_the_raw_weights(tmp_path, monkeypatch):
    history = []
    watch_weights(monkeypatch, lambda m: history.append([p.detach().double() for p in m.velocity.parameters()]))
    folder = train(config("train", tmp_path, *BASE))
    history.append([p.double() for p in files.load(files.find(folder, "raw")).parameters()])
    assert len(history) == STEPS + 1
    for name, halflife in (("ema0.0005", 500), ("ema0.002", 2000)):
        average = history[0]
        for step, weights in enumerate(history[1:], start=1):
            beta = 0.5 ** (32 / min(halflife, 0.05 * 32 * step))
            average = [beta * a + (1 - beta) * w for a, w in zip(average, weights, strict=True)]
        loaded = files.load(files.find(folder, name)).parameters()
        for expected, found in zip(average, loaded, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


class Accident(Exception):
    pass


def at_stop(act):
    def check(module):
        if module.global_step == STOP:
            act()

    return check


def fail():
    raise Accident


@pytest.mark.parametrize("every_s", [0, 60])
def test_after_an_exception_it_goes_on_to_the_same_bits(tmp_path, monkeypatch, undisturbed, every_s):
    """With a checkpoint of every step, and with none, where it starts again."""
    cfg = config("train", tmp_path, *BASE, f"trainer.checkpoint_every_s={every_s}")
    with monkeypatch.context() as patch, pytest.raises(Accident):
        watch_weights(patch, at_stop(fail))
        train(cfg)
    folder = tmp_path / "train" / undisturbed.name
    assert not (folder / "done.json").exists() and (folder / "last.ckpt").exists() == (every_s == 0)
    seen = []
    watch_weights(monkeypatch, lambda m: seen.append(m.global_step))
    assert outcome(train(cfg)) == outcome(undisturbed)
    assert seen[0] == (STOP if every_s == 0 else 0) and not (folder / "last.ckpt").exists()


def test_an_interrupted_upload_loses_no_training(tmp_path, monkeypatch, undisturbed):
    """A logger may take minutes at the end, when all is trained."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Loggers, "trained", lambda *_: signal.raise_signal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(config("train", tmp_path, *BASE))
    monkeypatch.setattr(training, "fit", None)
    assert outcome(train(config("train", tmp_path, *BASE))) == outcome(undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, undisturbed, capsys):
    cfg = config("train", tmp_path, *BASE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch_weights(patch, at_stop(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        train(cfg)
    assert f"stopped at step {STOP + 1} of {STEPS}, saved" in capsys.readouterr().out
    assert outcome(train(cfg)) == outcome(undisturbed)


def test_a_run_notes_its_cost_over_its_resumes(tmp_path, monkeypatch):
    """The first leg takes an hour by the clock."""
    cfg, monotonic, hours = config("train", tmp_path, *BASE), time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 3600 * hours[0])

    def wait_and_stop():
        hours[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch_weights(patch, at_stop(wait_and_stop))
        train(cfg)
    hours[0] += 1  # between the legs
    cost = training.cost(train(cfg))
    assert cost["kimg"] == 1.28 and 3600 < cost["seconds"] < 3660 and cost["device"] == parts.device_name(cfg)
    assert training.cost(tmp_path) == {"kimg": None, "seconds": None, "device": None}


COMMAND = f"""
import os, sys
import torch
torch.set_num_threads(1)
from reflow_lab import cli
from reflow_lab.training.module import FlowModule
step, number = FlowModule.training_step, int(sys.argv[1])
def training_step(self, batch, batch_idx):
    if self.global_step == {STOP}:
        os.kill(os.getpid(), number)
    return step(self, batch, batch_idx)
FlowModule.training_step = training_step
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("number", "status", "every_s", "saved"), [(signal.SIGINT, 130, 60, STOP + 1), (signal.SIGKILL, -9, 0, STOP)]
)
def test_a_signal_to_the_command(tmp_path, undisturbed, number, status, every_s, saved):
    """SIGINT finishes the step, saves and exits with 130; SIGKILL leaves the last checkpoint; both go on to the same bits."""
    overrides = [*BASE, f"trainer.checkpoint_every_s={every_s}"]
    command = [sys.executable, "-c", COMMAND, str(int(number)), *SMALL, f"outputs={tmp_path}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    folder = tmp_path / "train" / undisturbed.name
    assert not (folder / "done.json").exists() and "Traceback" not in done.stderr
    assert training.checkpoint_step(folder / "last.ckpt") == saved
    assert outcome(train(config("train", tmp_path, *overrides))) == outcome(undisturbed)


def test_a_signal_in_a_step_that_diverged_saves_nothing(tmp_path, monkeypatch, capsys):
    def ruin(module):
        if module.global_step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
            torch.nn.init.constant_(next(module.velocity.parameters()), float("nan"))

    watch_weights(monkeypatch, ruin)
    with pytest.raises(UserError, match=rf"^loss=nan at step {STOP + 1}: stopped, the last checkpoint is kept"):
        train(config("train", tmp_path, *BASE))
    assert "saved" not in capsys.readouterr().out and not any(tmp_path.rglob("last.ckpt"))


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    cfg = config("train", tmp_path, *BASE, "trainer.checkpoint_every_s=0")
    with monkeypatch.context() as patch, pytest.raises(Accident):
        watch_weights(patch, at_stop(fail))
        train(cfg)
    path = next(tmp_path.rglob("last.ckpt"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{path}: damaged checkpoint"):
        train(cfg)


def test_divergence_ends_in_one_line_and_keeps_the_last_good_checkpoint(tmp_path):
    overrides = ("training.lr=1e30", "training.warmup_kimg=0", "training.gradient_clip=null", "trainer.checkpoint_every_s=0")
    cfg = config("train", tmp_path, *BASE, *overrides)
    with pytest.raises(UserError, match=r"=(nan|inf) at step \d+: .*training\.lr") as error:
        train(cfg)
    assert "\n" not in str(error.value)
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert checkpoint["global_step"] < STEPS and all(v.isfinite().all() for v in checkpoint["state_dict"].values())
    assert not any(tmp_path.rglob("done.json")) and not any(tmp_path.rglob("*.safetensors"))


def mixed(tmp_path, teacher, *overrides):
    """The run of a mixture: what it printed is the test's to read."""
    words = ("teacher=run", f"teacher.path={teacher}", "training.total_kimg=0.64", "training.ema_halflives_mimg=[0.001]")
    return train(config("train", tmp_path / "outputs", *QUICK, *words, *overrides))


def test_the_mix_is_said_and_logged_and_the_held_out_loss_told_apart(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr(training.Loggers, "__call__", lambda _: [JSONLines(tmp_path / "another.jsonl")])
    folder = mixed(tmp_path, teacher, "lrn.coupling.forward=3", "lrn.coupling.backward=1", "lrn.coupling.online=1")
    assert capsys.readouterr().out.count("pairs in a batch of 32: 7 backward, 19 forward, 6 online\n") == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mix = {"step": 1, "mix/backward": 7 / 32, "mix/forward": 19 / 32, "mix/online": 6 / 32}
    assert [line for line in lines if "mix/backward" in line] == [mix]
    assert json.loads((tmp_path / "another.jsonl").read_text().splitlines()[0]) == mix
    (heldout,) = [line for line in lines if "heldout_loss" in line]
    parts = {kind: heldout[f"heldout_loss/{kind}"] for kind in ("backward", "forward", "online")}
    assert len(set(parts.values())) == 3
    weighted = (3 * parts["backward"] + 10 * parts["forward"] + 3 * parts["online"]) / 16
    assert weighted == pytest.approx(heldout["heldout_loss"], rel=1e-5)


def test_a_mix_is_logged_once_whatever_happens(tmp_path, monkeypatch, undisturbed):
    """Started anew without a checkpoint, the first attempt's line is cut."""
    with monkeypatch.context() as patch, pytest.raises(Accident):
        watch_weights(patch, at_stop(fail))
        train(config("train", tmp_path, *BASE))
    folder = train(config("train", tmp_path, *BASE))
    assert outcome(folder) == outcome(undisturbed)
    assert [line["mix/independent"] for line in outcome(folder)[1] if "mix/independent" in line] == [1]


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (["lrn/coupling=minibatch_ot"], "minibatch_ot"),
        (["lrn.coupling.independent=1", "lrn.coupling.minibatch_ot=1"], "independent and minibatch_ot"),
        (["lrn/coupling=online"], None),
        (["lrn/coupling=minibatch_ot", "dyn/weight=learned_normalisation"], None),
    ],
)
def test_a_weight_that_biases_a_stochastic_coupling_warns(tmp_path, teacher, overrides, kinds, recwarn):
    mixed(tmp_path, teacher, "dyn/weight=loss_normalisation", *overrides)
    said = [str(w.message) for w in recwarn if "minimiser" in str(w.message)]
    assert len(said) == (kinds is not None) and (not kinds or f"under {kinds} pairs; see dyn/weight=learned" in said[0])


def test_few_step_samples_are_compared_with_the_pairs_image_only_where_there_is_one(tmp_path, teacher):
    for coupling, paired in (("online", True), ("minibatch_ot", False)):
        folder = mixed(tmp_path, teacher, f"lrn/coupling={coupling}", "trainer.few_step_every_kimg=0.32")
        logged = (folder / "metrics.jsonl").read_text()
        assert "few_step/nfe9/straightness" in logged and ("few_step/nfe9/paired_rmse" in logged) == paired


@pytest.fixture
def teacher(tmp_path):
    return teacher_file(tmp_path / "teacher.safetensors", exact=False)


def reflow(tmp_path, path, *overrides):
    return config("train", tmp_path / "outputs", *QUICK, "teacher=run", f"teacher.path={path}", *overrides)


def test_no_training_gives_the_teachers_weights(tmp_path, teacher):
    folder = train(reflow(tmp_path, teacher, "training.total_kimg=0"))
    student, original = files.load(files.find(folder)), files.load(teacher)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), original.parameters(), strict=True))
    assert not (tmp_path / "outputs" / "pairs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("net.sigma_data=0.8", r"net\.sigma_data: 0\.5 in the file, 0\.8 here; net=teacher takes the teacher's$"),
        ("net.network.width=24", r"net\.network\.width: 16 in the file, 24 here; net=teacher takes the teacher's$"),
        ("net.network.num_layers=2", r"net\.network\.num_layers: 1 in the file, 2 here; net=teacher takes the teacher's$"),
    ],
)
def test_a_teacher_with_another_network_is_refused(tmp_path, teacher, override, message):
    with pytest.raises(UserError, match=rf"teacher\.path={teacher}: these weights belong to another network; {message}"):
        train(reflow(tmp_path, teacher, override, "training.total_kimg=0"))
    assert not (tmp_path / "outputs").exists()


def test_the_teachers_dropout_may_differ(tmp_path, teacher):
    assert train(reflow(tmp_path, teacher, "net.network.dropout=0.3", "training.total_kimg=0")).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.dim=3"], r"teacher\.path=.*makes samples of shape \(2,\), but the data has \(3,\)"),
        (["net.network.num_classes=2", "training.start=scratch"], r"net\.network\.num_classes=2: backward pairs come with 0"),
        (["training.start=nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["training.batch_size=200"], r"training\.batch_size=200: takes 100 backward samples a batch"),
        (["training.batch_size=1.5"], r"training\.batch_size=1\.5: must be a whole number of at least 1"),
        (["training.lr=fast"], r"training\.lr=fast: must be a positive number"),
        (["training.gradient_clip=0"], r"training\.gradient_clip=0: must be a positive number"),
        (["trainer.log_every_kimg=0"], r"trainer\.log_every_kimg=0: must be a positive number"),
        (["training.total_kimg=-1"], r"training\.total_kimg=-1: must be a number of at least 0"),
        (["training.total_kimg=0.01"], r"training\.total_kimg=0\.01: is no step at all: a batch has 32 samples"),
        (["lrn.coupling.forward=0.001"], r"lrn\.coupling\.forward=0\.001: .*no forward sample in a batch of 32"),
        (["seed=4294967296"], r"seed=4294967296: must be below 2\^31"),
        (["t_max=1.5"], r"t_max=1\.5: must lie in \(0, 1\]"),
        (["nfe=0"], r"nfe=0: must be a whole number of at least 1"),
    ],
)
def test_bad_values_are_named(tmp_path, teacher, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train(reflow(tmp_path, teacher, *overrides))
    assert "\n" not in str(error.value) and not (tmp_path / "outputs").exists()


def test_a_conditional_network_wants_labelled_data(tmp_path):
    with pytest.raises(UserError, match=r"net\.network\.num_classes=2: independent pairs come with 0 classes"):
        train(config("train", tmp_path, *BASE, "net.network.num_classes=2"))


def test_labels_reach_a_conditional_network(tmp_path):
    overrides = ("data=two_moons", "data.num_points=400", "net.network.num_classes=2", "training.total_kimg=0.64")
    folder = train(config("train", tmp_path, *BASE, *overrides))
    start = dict(training.start(config("train", tmp_path, *BASE, *overrides)).named_parameters())
    learned = dict(files.load(files.find(folder, "raw")).named_parameters())
    name = "network.conditioning.label.weight"
    assert not torch.equal(start[name], learned[name])


MOONS = [
    "data=two_moons",
    "data.num_points=4000",
    "net.network.width=64",
    "net.network.num_layers=2",
    "training.batch_size=128",
    "training.num_heldout=64",
    "trainer.log_every_kimg=50",
    "trainer.diagnostics_every_kimg=500",
]


def paired_error(velocity, teacher):
    """RMS distance between one Euler step and the teacher's many, from the same noise."""
    x1 = normal(99, "test", np.arange(500), (2,))
    target = sample(teacher, x1, solver=Heun(), grid=Uniform(), nfe=59)
    return (sample(velocity, x1, solver=Euler(), grid=Uniform(), nfe=1) - target).square().mean().sqrt().item()


def test_reflow_straightens_a_base_flow(tmp_path):
    """The whole way: base flow, backward and forward pairs from it, a ReFlow started from it; one step comes near many."""
    moons = [*MOONS, "training.total_kimg=60", "training.ema_halflives_mimg=[0.005]", "net.network.dropout=0.1"]
    base = train(config("train", tmp_path, *BASE, *moons))
    drawn = [f"pairs.{key}=2000" for key in ("num_backward", "num_forward", "batch_size", "shard_size")]
    chosen = [
        "dyn/time=exponential",
        "dyn/weight=loss_normalisation",
        "lrn=improved",
        "lrn/dropout=none",
        "training.lr=1e-3",
    ]
    student = train(config("train", tmp_path, *QUICK, "teacher=run", f"teacher.path={base}", *moons, *drawn, *chosen))
    teacher, straightened = (files.load(files.find(folder)) for folder in (base, student))
    before, after = paired_error(teacher, teacher), paired_error(straightened, teacher)
    assert before > 0.3 and after < 0.5 * before
    kinds = {json.loads(p.read_text())["kind"] for p in tmp_path.glob("pairs/*/manifest.json")}
    assert kinds == {"backward", "forward"}


def test_weights_and_biases_leaves_the_run_folder_whole(tmp_path):
    """Offline; its files change after the run, and its run must end for the next training to have its own."""
    for seed in (0, 1):
        cfg = config("train", tmp_path, *BASE, "logger=wandb", f"seed={seed}", "training.total_kimg=0.64")
        folder = train(cfg)
        assert Artifact(folder, {}).is_done() and train(cfg) == folder
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{folder.name}/*.wandb"))) == 1


def test_loss_normalisation_that_is_learned_trains_end_to_end(tmp_path):
    folder = train(config("train", tmp_path, *BASE[: -len(QUICK)], *QUICK[1:], "dyn/weight=learned_normalisation"))
    _, metrics = outcome(folder)
    calibration = [line["by_time/t0.562/calibration"] for line in metrics if "heldout_loss" in line]
    assert len(calibration) == 2 and abs(calibration[1]) < abs(calibration[0])
