"""A study that is killed in the middle of a row, and goes on by the same command: real processes, a real signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROWS = [
    {"name": "BSL", "overrides": ["dyn=baseline"]},
    {"name": "+time", "overrides": ["dyn=baseline", "dyn/time=exponential"], "against": "BSL"},
]
TIMED = ("ms_per_image", "training", "run")  #: of a cell: what differs between two runs of the same


def start(folder, words, log):
    command = [sys.executable, "-m", "reflow_lab.cli", "study", "study=mine", *words, f"outputs={folder}", f"out={folder}/table"]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)


def told(folder):
    """The result, timings aside."""
    found = json.loads((folder / "table" / "table.json").read_text())
    cells = [{key: value for key, value in cell.items() if key not in TIMED} for cell in found["cells"]]
    return found["estimates"], found["effects"], cells


@pytest.mark.slow
def test_a_killed_study_ends_with_the_table_of_an_undisturbed_one(toy, tmp_path, monkeypatch):
    """SIGKILL while the second row trains, with a checkpoint of it there and the first row done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    study = {"title": "t", "overrides": ["lrn=baseline", "training.total_kimg=60"], "nfe": [1, 3], "rows": ROWS}
    (tmp_path / "experiments" / "mine.yaml").write_text(yaml.safe_dump(study))
    words = [*toy.words(), "seeds=2", "trainer.checkpoint_every_s=0.5"]
    words = [word for word in words if not word.startswith("outputs=")]
    undisturbed = start(tmp_path / "a", words, tmp_path / "a.log")
    assert undisturbed.wait(300) == 0, (tmp_path / "a.log").read_text()

    killed, deadline = start(tmp_path / "b", words, tmp_path / "b.log"), time.monotonic() + 300
    train = tmp_path / "b" / "train"
    while not (len(list(train.glob("*/done.json"))) >= 2 and list(train.glob("*/last.ckpt"))):
        assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "b.log").read_text()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    unfinished: list[Path] = [path.parent for path in train.glob("*/last.ckpt")]
    assert unfinished and not (unfinished[0] / "done.json").exists() and not (tmp_path / "b" / "table").exists()

    assert start(tmp_path / "b", words, tmp_path / "c.log").wait(300) == 0, (tmp_path / "c.log").read_text()
    assert (unfinished[0] / "done.json").exists()
    assert told(tmp_path / "b") == told(tmp_path / "a")
