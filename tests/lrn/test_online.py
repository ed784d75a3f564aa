import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.inf.grids import EDM
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import HeunSigma
from reflow_lab.lrn import online, pairs
from reflow_lab.lrn.couplings import HELD_OUT, Mixture
from reflow_lab.noise import normal
from reflow_lab.training.module import FlowModule
from reflow_lab.training.train import plan, train
from toy import config, teacher_file

QUICK = [
    *["lrn/coupling=online", "dyn/weight=velocity", "dyn/time=uniform", "dyn/metric=squared_error"],
    *["training.total_kimg=0.64", "training.batch_size=32", "training.num_heldout=8", "training.ema_halflives_mimg=[0.001]"],
    *["trainer.log_every_kimg=0.16", "trainer.diagnostics_every_kimg=0.32", "trainer.checkpoint_every_s=0"],
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    return teacher_file(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", exact=False)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("exact") / "teacher.safetensors")


def configured(tmp_path, teacher, *overrides):
    return config("train", tmp_path / "outputs", *QUICK, "teacher=run", f"teacher.path={teacher}", *overrides)


def test_pairs_are_where_the_teacher_carries_the_noise(tmp_path, exact):
    """N(0, 1/4): from t_max x1 to x0 = t_max x1 (1/2) / sqrt(t_max^2 + (1 - t_max)^2 / 4), to the solver's error."""
    source = online.open_online(configured(tmp_path, exact, "pairs.nfe=201"))
    x0, x1, label, _ = source.read(np.zeros(64, np.int64), 1000)
    assert label is None and torch.equal(x1, normal(0, online.STREAM, np.arange(1000, 1064), (2,)))
    shrink = 0.5 * T_MAX / math.hypot(T_MAX, 0.5 * (1 - T_MAX))
    torch.testing.assert_close(x0, shrink * x1, rtol=2e-3, atol=1e-6)
    assert not x0.requires_grad and not x0.is_inference()


def test_pairs_equal_a_stores_solve_of_the_same_noise(tmp_path, teacher, monkeypatch):
    cfg = configured(tmp_path, teacher)
    x0, x1, _, _ = online.open_online(cfg).read(np.arange(16), 0)
    made, source = pairs.plan(cfg, "backward"), parts.data_source(cfg).split("train")
    monkeypatch.setattr(pairs, "pair_noise", lambda seed, indices, shape: normal(cfg.seed, online.STREAM, indices, shape))
    (stored,) = pairs.solve(parts.teacher(cfg).velocity(cfg), made.recipe, source, np.arange(16), torch.device("cpu"))
    assert torch.equal(x0, stored)
    alone = sample(parts.teacher(cfg).velocity(cfg), x1, solver=HeunSigma(), grid=EDM(), nfe=9)
    assert torch.equal(x0, alone)


def test_batches_are_a_function_of_the_step_and_held_out_noise_is_apart(tmp_path, teacher):
    sources = {"online": online.open_online(configured(tmp_path, teacher))}
    train_on, heldout = Mixture(online=1).open(sources, 16, 0, 8)
    forwards = [train_on.batch(step) for step in range(5)]
    for step in reversed(range(5)):
        assert all(torch.equal(a, b) for a, b in zip(train_on.batch(step)[:2], forwards[step][:2], strict=True))
    seen = torch.cat([batch.x1 for batch in forwards])
    assert len(seen.unique(dim=0)) == 80 and not torch.isin(heldout.batch(0).x1, seen).any()
    assert torch.equal(heldout.batch(0).x1, normal(0, online.STREAM, np.arange(HELD_OUT, HELD_OUT + 8), (2,)))


def test_labels_of_a_conditional_teacher(tmp_path):
    more = ["data=two_moons", "data.num_points=400", "net.network.num_classes=2"]
    path = teacher_file(tmp_path / "teacher.safetensors", *more, exact=False)
    source = online.open_online(configured(tmp_path, path, *more))
    x0, x1, label, _ = source.read(np.arange(500), 0)
    assert label.dtype == torch.int64 and 200 < label.sum() < 300 and set(label.tolist()) == {0, 1}
    other = sample(source.velocity, x1, label=1 - label, **source.sampling)
    assert (x0 != other).any(1).all()


def test_the_teacher_is_frozen_and_stays_out_of_the_checkpoint(tmp_path, teacher, monkeypatch):
    sources, sizes = [], []
    opened, step = online.open_online, FlowModule.training_step

    def training_step(self, batch, batch_idx):
        sizes.append({sum(p.numel() for p in group["params"]) for group in self.trainer.optimizers[0].param_groups})
        assert sum(p.numel() for p in self.parameters()) == sum(p.numel() for p in self.velocity.parameters())
        if self.global_step == 3:
            raise KeyError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(online, "open_online", lambda cfg: sources.append(opened(cfg)) or sources[-1])
    monkeypatch.setattr(FlowModule, "training_step", training_step)
    with pytest.raises(KeyError):
        train(configured(tmp_path, teacher))
    velocity = sources[0].velocity
    before = dict(parts.teacher(configured(tmp_path, teacher)).velocity(configured(tmp_path, teacher)).named_parameters())
    assert isinstance(velocity, nn.Module) and not velocity.training
    for name, parameter in velocity.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and not parameter.requires_grad
    student = sum(p.numel() for p in velocity.parameters())  # of the same architecture
    assert sizes[0] == {student}
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert sum(v.numel() for v in checkpoint["state_dict"].values()) == student


def test_an_interrupted_run_goes_on_to_the_same_bits_and_nothing_is_stored(tmp_path, teacher, monkeypatch):
    def outcome(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = [p.read_bytes() for p in sorted((folder / "weights").iterdir())]
        return weights, [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]

    undisturbed = train(configured(tmp_path / "a", teacher))
    assert {path.name for path in (tmp_path / "a" / "outputs").iterdir()} == {"train"}
    step = FlowModule.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(FlowModule, "training_step", lambda self, *_: step(self, *_) if self.global_step != 7 else {}["stop"])
        train(configured(tmp_path / "b", teacher))
    assert outcome(train(configured(tmp_path / "b", teacher))) == outcome(undisturbed)


def test_how_they_are_drawn_names_the_run(tmp_path, teacher, exact):
    def key(path, *overrides):
        return plan(configured(tmp_path, path, "training.start=scratch", *overrides)).key

    changes = ["pairs.nfe=5", "inf/grid@pairs.grid=uniform", "inf/solver@pairs.solver=euler", "seed=3"]
    same = key(teacher)
    assert len({same, key(exact), *(key(teacher, change) for change in changes)}) == 6
    unused = ["pairs.seed=5", "pairs.num_backward=7", "pairs.batch_size=3", "pairs.shard_size=9", "pairs.dtype=float16"]
    assert key(teacher, *unused) == same


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inf/solver@pairs.solver=flow_map"], r"pairs/solver=flow_map: needs a flow map"),
        (["inf/solver@pairs.solver=adaptive"], r"pairs\.solver=.*Adaptive: must be a fixed-step solver"),
        (["pairs.nfe=0"], r"pairs\.nfe=0: must be a whole number of at least 1"),
        (["net.network.num_classes=2", "data=two_moons"], r"net\.network\.num_classes=2: online pairs come with 0 classes"),
        (["teacher=none"], r"teacher\.path=None: needs a run folder"),
    ],
)
def test_mistakes_are_named(tmp_path, teacher, overrides, message):
    words = ["training.start=scratch", *overrides]
    cfg = configured(tmp_path, teacher, *words)
    if "teacher=none" in words:
        cfg = config("train", tmp_path / "outputs", *QUICK, *words)
    with pytest.raises(UserError, match=message) as error:
        plan(cfg)
    assert "\n" not in str(error.value) and not (tmp_path / "outputs").exists()
