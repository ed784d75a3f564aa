import numpy as np
import pytest
import torch

from reflow_lab.dyn.metrics import SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Uniform
from reflow_lab.dyn.weights import PowerOfTime
from reflow_lab.errors import UserError
from reflow_lab.flow import NO_LABEL
from reflow_lab.lrn.couplings import Batch
from reflow_lab.networks import files
from reflow_lab.training.label_dropout import drop_labels
from reflow_lab.training.module import FlowModule
from reflow_lab.training.train import train
from toy import config

POSITIONS = np.arange(20_000)
LABEL = torch.arange(20_000) % 7


def dropped(probability, seed=3, positions=POSITIONS):
    return drop_labels(LABEL[torch.from_numpy(positions % 20_000)], probability, seed, positions)


def test_the_rate():
    found = dropped(0.1)
    missing = found == NO_LABEL
    assert abs(missing.double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(found[~missing], LABEL[~missing]) and found.dtype == torch.int64
    assert torch.equal(dropped(0.0), LABEL) and (dropped(1.0) == NO_LABEL).all()


def test_keyed_by_seed_and_position_and_not_by_the_batch():
    whole = dropped(0.3)
    split = torch.cat([dropped(0.3, positions=part) for part in np.split(POSITIONS, [17, 5000])])
    assert torch.equal(split, whole)
    assert not torch.equal(dropped(0.3, seed=4), whole) and not torch.equal(dropped(0.3, positions=POSITIONS + 20_000), whole)


class Labels:
    """Pairs whose labels say where they are; the velocity below keeps those that it sees."""

    def batch(self, step):
        return Batch(torch.zeros(50, 2), torch.ones(50, 2), torch.arange(50 * step, 50 * step + 50))


class Seen(torch.nn.Linear):
    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        self.label = label
        return super().forward(x_t)


def seen(monkeypatch, step, **more):
    monkeypatch.setattr(FlowModule, "global_step", step)
    objective = Objective(Uniform(), SquaredError(), PowerOfTime(2))
    module = FlowModule(Seen(2, 2), objective, Labels(), batch_size=50, lr=0.1, seed=3, **more)
    module.training_step(None, 0)
    return module.velocity.label


def test_a_step_drops_the_labels_of_its_positions(monkeypatch):
    """So a resumed run drops the same ones."""
    found = seen(monkeypatch, 7, label_dropout=0.4)
    expected = torch.arange(350, 400)
    assert torch.equal(found, drop_labels(expected, 0.4, 3, np.arange(350, 400)))
    assert 5 < (found == NO_LABEL).sum() < 40
    assert torch.equal(seen(monkeypatch, 7), expected)


TWO = [
    "data=two_moons",
    "data.num_points=400",
    "net.network.num_classes=2",
    "teacher=none",
    "training=base_flow",
    "lrn=base_flow",
]
SHORT = [
    "training.total_kimg=0.64",
    "training.batch_size=32",
    "training.num_heldout=16",
    "dyn/metric=squared_error",
    "dyn/weight=velocity",
]


def test_what_is_never_given_is_not_learnt(tmp_path):
    """With every label dropped the classes keep their first weights; the file says how it was trained."""

    def change(label_dropout):
        run = train(config("train", tmp_path, *TWO, *SHORT, f"training.label_dropout={label_dropout}"))
        start = train(config("train", tmp_path, *TWO, *SHORT, "training.total_kimg=0"))
        assert files.describe(files.find(run))["label_dropout"] == label_dropout
        trained, first = (files.load(files.find(folder, "raw")).network.conditioning.label.weight for folder in (run, start))
        return (trained - first).abs().max().item()

    assert change(1) == 0 and change(0.5) > 1e-5


MISTAKES = [
    ([*TWO, "training.label_dropout=1.5"], r"training\.label_dropout=1\.5: must be a probability in \[0, 1\]"),
    ([*TWO, "training.label_dropout=nan"], r"training\.label_dropout=nan: must be a probability"),
    (
        [*TWO, "net.network.num_classes=0", "training.label_dropout=0.1"],
        r"training\.label_dropout=0\.1: drops the labels of a cond",
    ),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES)
def test_mistakes(tmp_path, words, line):
    with pytest.raises(UserError, match=f"^{line}"):
        train(config("train", tmp_path, *words, *SHORT))
