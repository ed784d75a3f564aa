"""SIGKILL at random steps, several times in one training: the weights, averages and metrics are those of an undisturbed one."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_train import BASE, QUICK, STEPS, outcome

from reflow_lab.training.train import train
from toy import SMALL, config, teacher_file

REFLOW = [
    *[word for word in QUICK if not word.startswith("dyn")],
    *["teacher=run", "training.total_kimg=1.28", "training.ema_halflives_mimg=[0.0005,0.002]", "net.network.dropout=0.1"],
    *["lrn/coupling=forward_backward", "lrn/dropout=half", "dyn=improved", "dyn/metric=squared_error"],
]
FLOW_MAP = [
    *["teacher=run", "training=flow_map", "lrn=flow_map", "inf=flow_map", "flow_map=ayf", "flow_map.warmup_steps=20"],
    *["training.total_kimg=1.28", "training.ema_halflives_mimg=[0.0005,0.002]", "net.network.dropout=0.1", "lrn/dropout=half"],
    *[word for word in QUICK if not word.startswith("dyn")],
]
CASES = {
    "base flow": BASE,
    "base flow, learned weight": [*BASE, "dyn/weight=learned_normalisation"],
    "ReFlow": REFLOW,
    "flow map": FLOW_MAP,
    "flow map by finite differences": [*FLOW_MAP, "flow_map/derivative=finite_difference", "flow_map/objective=lmd"],
    "ReFlow, learned weight": [*REFLOW, "dyn/weight=learned_normalisation"],
}
COMMAND = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from reflow_lab import cli
from reflow_lab.training.module import FlowModule
step, last = FlowModule.training_step, int(sys.argv[1])
def training_step(self, batch, batch_idx):
    if self.global_step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
FlowModule.training_step = training_step
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_steps_it_ends_with_the_same_bits(tmp_path, case):
    torch.set_num_threads(1)
    teacher = teacher_file(tmp_path / "teacher.safetensors", exact=False)
    words = [*CASES[case], *([] if case.startswith("base") else [f"teacher.path={teacher}"]), "trainer.checkpoint_every_s=0"]
    undisturbed = train(config("train", tmp_path / "undisturbed", *words))
    stops = sorted(np.random.default_rng(len(case)).choice(np.arange(1, STEPS), 2, replace=False))
    for stop in stops:
        command = [sys.executable, "-c", COMMAND, str(stop), *SMALL, f"outputs={tmp_path / 'killed'}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "killed" / "train" / undisturbed.name / "done.json").exists()
    assert outcome(train(config("train", tmp_path / "killed", *words))) == outcome(undisturbed)
