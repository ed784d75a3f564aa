"""Sweeps with `-m`: each job its own folder, a failing one ends no other, whatever launcher runs them."""

import json
import re
import sys

import pytest
from joblib.externals.loky import get_reusable_executor

import tiny
from reflow_lab import cli
from reflow_lab.training import train
from test_tracking import Offline

LAUNCHERS = ["local", "joblib", "submitit_local"]
JOBS = """
import os, signal
from pathlib import Path
from reflow_lab.errors import require

def job(cfg):
    require(cfg.seed != 1, "seed", cfg.seed, "must not be 1")
    if cfg.seed == 2:
        raise ValueError("a bug\\nof ours")
    if cfg.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 4:
        raise KeyboardInterrupt
    Path(f"ran{cfg.seed}").touch()
    return cfg.seed

def finish(jobs):
    print("table of", [result for _, result in jobs], jobs[0][0])
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    """Sweep a verb of which seeds 1 to 4 fail: (status, stdout, stderr, the seeds that ran to their end)."""
    (tmp_path / "seeds.py").write_text(JOBS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "seeds", raising=False)
    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("seeds:job", "", finish="seeds:finish"))
    get_reusable_executor().shutdown()  # joblib's processes of another test would look for `seeds` where that one looked

    def sweep(*words):
        status = cli.main(["train", "-m", *words])
        return status, *capfd.readouterr(), sorted(int(path.name[3:]) for path in tmp_path.glob("ran*"))

    return sweep


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_crash_does_not_end_the_others(sweep, launcher):
    status, out, err, ran = sweep(f"launcher={launcher}", "seed=0,2,1,5")
    assert status == 1 and ran == [0, 5]
    assert f"table of [0, 5] ['launcher={launcher}', 'seed=0']" in out  # what finished is put together, wherever it ran
    assert [line for line in err.splitlines() if line.startswith(("failed: ", "reflow-lab: "))] == [
        "failed: seed=2: ValueError: a bug of ours",
        "failed: seed=1: seed=1: must not be 1",
        "reflow-lab: 2 of 4 jobs failed; what the others made is kept, and the same command does the rest",
    ]
    assert launcher == "submitit_local" or "Traceback" in err  # there it is in the job's log


def test_only_the_users_mistakes(sweep):
    assert sweep("seed=0,1")[::3] == (2, [0])


def test_one_job_that_failed_is_no_sweep(sweep):
    status, _, err, _ = sweep("seed=1")
    assert status == 2 and err.splitlines()[-1] == "reflow-lab: seed=1: must not be 1" and "failed:" not in err


def test_a_crash_alone_has_one_traceback(sweep):
    status, _, err, _ = sweep("seed=2")
    assert status == 1 and err.count("Traceback") == 1
    assert err.splitlines()[-1] == "reflow-lab: ValueError: a bug of ours"


def test_interrupt_ends_all(sweep):
    assert sweep("seed=0,4,5")[::3] == (130, [0])


def test_a_killed_job_of_submitit(sweep):
    status, _, err, ran = sweep("launcher=submitit_local", "seed=0,3,5")
    assert status == 1 and ran == [0, 5]
    assert re.search(r"^failed: seed=3: ended without a result, killed perhaps; its log: \S+_log\.err$", err, re.MULTILINE)


def test_a_killed_job_of_joblib(sweep):
    status, _, err, _ = sweep("launcher=joblib", "seed=3,0")
    assert status == 1 and "reflow-lab: a job's process was killed" in err and "Traceback" not in err


def test_slurm_that_is_not_there(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "")
    status, _, err, _ = sweep("launcher=slurm", "seed=0,5", "hydra.launcher.partition=gpu")
    assert status == 2 and err.splitlines()[-1].startswith("reflow-lab: launcher=slurm: there is no srun here")


def test_a_launcher_that_is_not_installed(capfd):
    assert cli.main(["train", "launcher=ray"]) == 2
    assert capfd.readouterr().err == "reflow-lab: launcher=ray: not installed; pip install reflow_lab[ray]\n"


TRAINING = ["experiment=toy_base", *tiny.COMMON, "data.num_points=2000", "net.network.width=32", "evaluation.num_images=1000"]
SWEPT = ["seed=0,1", "dyn/time=uniform,exponential"]
LOGGED = ["logger=wandb", "logger.offline=true", "logger.group=ladder", "logger.tags=[mine]"]


@pytest.mark.parametrize("launcher", [LAUNCHERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS[1:])])
def test_four_jobs_four_folders_four_runs_of_wandb(tmp_path, monkeypatch, launcher):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "-m", *TRAINING, *SWEPT, *LOGGED, f"launcher={launcher}", f"outputs={tmp_path}/outputs"]) == 0
    recipes = {p.parent.name: json.loads(p.read_text())["config"] for p in tmp_path.glob("outputs/train/*/recipe.json")}
    jobs = {key: (r["seed"], r["dyn"]["time"]["_target_"].rpartition(".")[2]) for key, r in recipes.items()}
    assert sorted(jobs.values()) == [(0, "Exponential"), (0, "Uniform"), (1, "Exponential"), (1, "Uniform")]
    assert len(list(tmp_path.glob("outputs/train/*/done.json"))) == 4
    runs = [Offline(path) for path in tmp_path.glob("outputs/wandb/offline-run-*/run-*.wandb")]
    assert {run.run.run_id for run in runs} == set(jobs) and len(runs) == 4
    for run in runs:
        seed, time = jobs[run.run.run_id]
        on = ["time"] if time == "Exponential" else []
        assert (run.run.run_group, run.run.job_type) == ("ladder", "train")
        assert [*run.run.tags] == [*on, "grid", "solver", "inf", "two_moons", "mine"]
        assert run.config["seed"] == seed and run.config["dyn"]["time"]["_target_"].endswith(f".{time}")
        assert run.values("loss")


def test_a_repeated_sweep_skips_what_is_done(tmp_path, monkeypatch):
    def fit(*_):
        raise AssertionError("trained")

    command = ["train", "-m", *TRAINING, "seed=0,1", f"outputs={tmp_path}"]
    assert cli.main(command) == 0
    monkeypatch.setattr(train, "fit", fit)
    assert cli.main(command) == 0
