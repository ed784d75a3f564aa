"""Training by two processes on the CPU gives what one gives: losses, weights, files; and every way they are started and ended."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

import tiny
from reflow_lab import parallel, parts
from reflow_lab.data.augment import Augmentation
from reflow_lab.data.sets import ImageSet
from reflow_lab.errors import UserError
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.solvers import Euler
from reflow_lab.lrn.couplings import IndependentPairs, MinibatchOTPairs, Mixture, intersections
from reflow_lab.lrn.online import OnlinePairs
from reflow_lab.training import processes
from reflow_lab.training import train as training
from reflow_lab.training.module import FlowModule
from reflow_lab.training.train import train
from toy import SMALL, config, teacher_file

TORCHRUN = {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}
SRUN = {
    **{"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"},
    **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"},
    **{"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "MASTER_PORT": "{port}"},
}
QUICK = [
    *["training.batch_size=32", "training.num_heldout=16", "training.total_kimg=0.64", "training.warmup_kimg=0.1", "nfe=2"],
    *["trainer.log_every_kimg=0.032", "trainer.diagnostics_every_kimg=0.32", "training.ema_halflives_mimg=[0.0005]"],
    "dyn/metric=squared_error",
]
BASE = ["teacher=none", "training=base_flow", "lrn=base_flow", "dyn/weight=velocity", *QUICK]
LEARNED = [*BASE, "dyn/weight=learned_normalisation"]
IMAGES = [
    *["experiment=quickstart_base", *tiny.COMMON, *tiny.IMAGES, "lrn/dropout=none", "dyn/weight=learned_normalisation"],
    *["training.flips=true", "training.total_kimg=0.128", "training.batch_size=16", "training.warmup_kimg=0.032", "nfe=2"],
    "trainer.log_every_kimg=0.016",
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def enter(cfg, rank: int, port: int, variables: dict[str, str], stop_at: int | None) -> None:
    """One of two processes; `stop_at`: the second one gets SIGTERM in that step."""
    os.environ |= {name: value.format(rank=rank, port=port) for name, value in variables.items()}
    step = FlowModule.training_step

    def stopped(module, batch, index):
        if module.global_step == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    FlowModule.training_step = stopped
    try:
        train(cfg)
    except KeyboardInterrupt:
        sys.exit(130)


def two(cfg, variables=TORCHRUN, stop_at=None) -> list[int | None]:
    """The exit statuses of two processes that enter `train` as torchrun's and srun's do; forked, since torch is imported here."""
    port, context = free_port(), multiprocessing.get_context("fork")
    spawned = [context.Process(target=enter, args=(cfg, rank, port, variables, stop_at)) for rank in (0, 1)]
    for one in spawned:
        one.start()
    for one in spawned:
        one.join(300)
        one.kill()
    return [one.exitcode for one in spawned]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same run: its key, the lines of its log but for timings, and its weights, to a tolerance."""
    assert one.name == other.name
    assert [list(line) for line in lines(one)] == [list(line) for line in lines(other)]
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        for key in ours.keys() - {"images_per_s"}:
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), key
    names = sorted(path.name for path in (one / "weights").iterdir())
    assert names == sorted(path.name for path in (other / "weights").iterdir())
    for name in names:
        theirs = load_file(other / "weights" / name)
        for key, ours in load_file(one / "weights" / name).items():
            torch.testing.assert_close(ours, theirs[key], atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's base flow, with the learned loss weight."""
    torch.set_num_threads(1)
    return train(config("train", tmp_path_factory.mktemp("alone"), *LEARNED))


def folder_of(outputs: Path) -> Path:
    (found,) = (outputs / "train").iterdir()
    return found


@pytest.mark.parametrize(
    ("variables", "trainer"), [(TORCHRUN, "trainer.devices=2"), (SRUN, "trainer=slurm")], ids=["torchrun", "srun"]
)
def test_two_processes_train_what_one_does(alone, tmp_path, variables, trainer):
    cfg = config("train", tmp_path, *LEARNED, trainer, "trainer.accelerator=cpu", "logger=wandb")
    cfg.trainer.update({key: value for key, value in config("train", tmp_path, *LEARNED).trainer.items() if "_every_" in key})
    assert two(cfg, variables) == [0, 0]
    made = folder_of(tmp_path)
    assert_same(alone, made)
    assert {path.name for path in made.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert json.loads((made / "cost.json").read_text())["devices"] == 2


def test_images_with_flips_are_flipped_the_same(tmp_path):
    one = train(tiny.composed("train", *IMAGES, f"outputs={tmp_path}/one"))
    assert two(tiny.composed("train", *IMAGES, f"outputs={tmp_path}/two", "trainer.devices=2")) == [0, 0]
    made = folder_of(tmp_path / "two")
    assert_same(one, made)
    assert (made / "few_step.png").exists()


def test_a_reflow_on_pairs_that_both_draw(tmp_path):
    teacher = f"teacher.path={teacher_file(tmp_path / 'teacher.safetensors', exact=False)}"
    mixture = ["lrn.coupling.backward=1", "lrn.coupling.forward=2", "lrn.coupling.online=1", "lrn/dropout=none"]
    overrides = ["teacher=run", teacher, *mixture, *QUICK]
    one = train(config("train", tmp_path / "one", *overrides))
    assert two(config("train", tmp_path / "two", *overrides, "trainer.devices=2")) == [0, 0]
    assert_same(one, folder_of(tmp_path / "two"))


def test_a_signal_to_either_saves_and_one_process_goes_on(alone, tmp_path, capfd):
    assert two(config("train", tmp_path, *LEARNED, "trainer.devices=2"), stop_at=9) == [130, 130]
    said = capfd.readouterr().out
    assert said.count("stopped at step 10 of 20, saved; the same command goes on") == 1
    checkpoint = torch.load(folder_of(tmp_path) / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10
    assert_same(alone, train(config("train", tmp_path, *LEARNED)))


def test_the_second_process_waits_for_the_first_ones_lock_and_returns_at_once_when_it_is_done(alone, capfd):
    outputs = alone.parents[1]
    before = {path.name: path.stat().st_mtime_ns for path in alone.iterdir()}
    assert two(config("train", outputs, *LEARNED, "trainer.devices=2")) == [0, 0]
    assert {path.name: path.stat().st_mtime_ns for path in alone.iterdir() if path.name != ".lock"}.items() <= before.items()
    assert capfd.readouterr().out == f"run: {alone}\n"


def test_a_users_error_of_the_first_is_everyones(alone, tmp_path, capfd):
    cfg = config("train", tmp_path, *LEARNED, "trainer.devices=2")
    folder = tmp_path / "train" / alone.name
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text('{"stage": "another"}')
    assert two(cfg) == [1, 1]
    assert capfd.readouterr().err.count("UserError: ") == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=33", r"^training\.batch_size=33: .* all 2 processes .*trainer\.devices=2"),
        ("trainer.num_nodes=2", r"^trainer\.num_nodes=2: several machines need srun or torchrun"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(config("train", tmp_path, *LEARNED, "trainer.devices=2", override))
    assert not any(tmp_path.iterdir())


def test_another_number_of_processes_than_were_started_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^trainer\.devices=2: makes 2 processes .* but 4 were started together$"):
        train(config("train", tmp_path, *LEARNED, "trainer.devices=2"))
    assert parts.num_processes(config("train", tmp_path, *LEARNED, "trainer=ddp")) == 4
    assert parts.num_processes(config("train", tmp_path, *LEARNED)) == 1


def test_several_machines_share_the_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    cfg = config("train", tmp_path, *LEARNED, "trainer=slurm")
    assert (cfg.trainer.num_nodes, parts.num_devices(cfg), parts.num_processes(cfg)) == (2, 4, 8)


def test_a_job_that_lightning_refuses_is_a_users_error(monkeypatch):
    for name in ("RANK", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match=r"^SLURM: .*--ntasks-per-node=2"):
        parallel.environment(2)


def still(x_t, t, s=None, *, label=None, lam_guid=None):
    """A teacher that takes no empty batch."""
    assert len(x_t)
    return 0.5 * x_t


CPU = torch.device("cpu")
IMAGE_SET = ImageSet(torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8), torch.arange(60) % 3, "random")
SOURCES = {
    "independent": IndependentPairs(IMAGE_SET, 5, Augmentation(flips=True)),
    "minibatch_ot": MinibatchOTPairs(IMAGE_SET, 5, by_class=True),
    "backward": IndependentPairs(IMAGE_SET, 6),
    "online": OnlinePairs(still, {"solver": Euler(), "grid": Uniform(), "nfe": 2, "t_max": 1.0}, (1, 4, 4), 3, 5, CPU),
}


@pytest.mark.parametrize("kinds", [("independent",), ("minibatch_ot",), tuple(SOURCES)])
@pytest.mark.parametrize("num", [2, 3, 12])
def test_the_processes_rows_make_up_the_global_batch(kinds, num):
    mixture, width = Mixture(**dict.fromkeys(kinds, 1.0)), 12 // num
    whole, heldout = mixture.open(SOURCES, 12, 5, 8)
    ranks = [mixture.open(SOURCES, 12, 5, 8, range(r * width, (r + 1) * width)) for r in range(num)]
    for step in (0, 3):
        expected, pieces = whole.batch(step), [coupling.batch(step) for coupling, _ in ranks]
        assert all(len(piece.x0) == width for piece in pieces)
        for i in range(3):
            torch.testing.assert_close(torch.cat([piece[i] for piece in pieces]), expected[i], rtol=0, atol=0)
    assert all(torch.equal(held.batch(0).x1, heldout.batch(0).x1) for _, held in ranks)


def test_rows_of_parts():
    assert intersections({"a": 3, "b": 5}, range(2, 4)) == {"a": range(2, 3), "b": range(0, 1)}
    assert [len(own) for own in intersections({"a": 3, "b": 5}, range(4, 8)).values()] == [0, 4]


def test_a_learned_loss_weight_starts_from_the_seed_alone(tmp_path):
    first = training.loss(config("train", tmp_path, *LEARNED)).state_dict()
    torch.rand(1)
    for seed, same in ((0, True), (1, False)):
        again = training.loss(config("train", tmp_path, *LEARNED, f"seed={seed}")).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first) is same


def test_masks_of_dropout_differ_between_processes_and_stay_those_of_one():
    def mask(first_row: int) -> torch.Tensor:
        module = FlowModule(torch.nn.Identity(), None, None, batch_size=32, lr=1, seed=3, first_row=first_row)
        module._seed_dropout(7)
        return torch.rand(4)

    assert torch.equal(mask(0), mask(0)) and not torch.equal(mask(0), mask(16))


def of_no_class(cfg, made):
    instantiate({"_target_": "no.such.Weight"})


def of_a_bug(cfg, made):
    raise IndexError("a bug")


@pytest.mark.parametrize(
    ("failing", "status", "said"),
    [(of_no_class, 2, r".*no\.such\.Weight.*"), (of_a_bug, 1, r"Traceback[\s\S]*IndexError: a bug")],
)
def test_a_process_words_a_mistake_as_the_command_does(tmp_path, monkeypatch, failing, status, said):
    monkeypatch.setattr(processes, "end_with_parent", lambda: None)
    monkeypatch.setattr(training, "train_here", failing)
    OmegaConf.save(config("train", tmp_path, *LEARNED), tmp_path / "config.yaml", resolve=True)
    assert processes.main(tmp_path) == status
    assert re.fullmatch(said, processes.report(tmp_path, 0).read_text().strip())


def test_what_another_torchrun_said_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = processes.environment(1, 2, 4711)
    assert "TORCHELASTIC_USE_AGENT_STORE" not in found and found["OMP_NUM_THREADS"] == "3"
    assert [found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")] == ["1", "1", "2", "4711"]


# the launcher, with processes that start in no time


def script(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time; rank = int(os.environ['RANK']); {text}"]


def codes(text: str, num: int = 2) -> list[int | None]:
    with processes.started(script(text), num) as workers:
        processes.wait(workers)
    return [worker.returncode for worker in workers]


def test_processes_are_numbered_and_waited_for():
    assert codes("sys.exit(0)") == [0, 0]
    assert codes("sys.exit(rank + 1)", 3) == [1, 2, 3]


def test_those_that_wait_for_a_failed_one_are_ended(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    began = time.monotonic()
    assert codes("time.sleep(60 * rank); sys.exit(2)") == [2, -signal.SIGKILL]
    assert time.monotonic() - began < 20


def test_signals_are_passed_on():
    text = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print(rank, flush=True); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    with processes.started(script(text), 2) as workers, processes.forwarded(workers) as came:
        time.sleep(1)  # until they have their handlers
        signal.raise_signal(signal.SIGTERM)
        processes.wait(workers)
    assert came == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
    assert [worker.returncode for worker in workers] == [130, 130]


def test_a_process_ends_with_the_one_that_started_it():
    text = "from reflow_lab.training import processes; processes.end_with_parent(); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE) as one:
        one.stdin.close()
        assert one.wait(60) == 1


def test_the_reason_is_the_users_mistake_before_the_troubles_it_made(tmp_path):
    processes.report(tmp_path, 0).write_text("Traceback: connection closed")
    processes.report(tmp_path, 1).write_text("training.lr=9: too much")
    found = processes.failure(tmp_path, [1, 2])
    assert isinstance(found, UserError) and str(found) == "training.lr=9: too much"
    assert "connection closed" in str(processes.failure(tmp_path, [1, 1]))


@pytest.mark.slow
def test_the_command_starts_them_itself_and_weights_and_biases_has_one_run(alone, tmp_path):
    words = [*LEARNED, "trainer.devices=2", "logger=wandb", f"outputs={tmp_path}"]
    command = [sys.executable, "-m", "reflow_lab.cli", "train", *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    made = folder_of(tmp_path)
    assert done.stdout.count(f"run: {made}") == 1 and done.stdout.count("pairs in a batch") == 1
    assert_same(alone, made)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_the_same_command_goes_on(alone, tmp_path):
    words = [*SMALL, *LEARNED, "training.total_kimg=64", f"outputs={tmp_path}"]
    command = [sys.executable, "-m", "reflow_lab.cli", "train", *words, "trainer.devices=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("train/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        one.send_signal(signal.SIGTERM)
        said, _ = one.communicate(timeout=60)
    assert one.returncode == 130 and said.count("saved; the same command goes on") == 1
    made = folder_of(tmp_path)
    step = torch.load(made / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 2000 and f"stopped at step {step} of 2000" in said
    assert lines(made)[-1]["step"] <= step
