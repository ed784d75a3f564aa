"""Pairs drawn from a guided teacher: backward, forward, online, and what their manifest says."""

import numpy as np
import pytest
import torch

from reflow_lab import cli, parts
from reflow_lab.data.toys import TwoMoons
from reflow_lab.errors import UserError
from reflow_lab.flow import NO_LABEL, T_MAX
from reflow_lab.inf.grids import EDM
from reflow_lab.inf.guidance import Guided
from reflow_lab.inf.sampler import invert, sample
from reflow_lab.inf.solvers import HeunSigma
from reflow_lab.lrn import pairs
from reflow_lab.lrn.online import open_online
from reflow_lab.lrn.store import pair_labels, pair_noise
from reflow_lab.networks import files
from reflow_lab.training.train import plan
from toy import config, teacher_file

TWO = ["data=two_moons", "data.num_points=400", "net.network.num_classes=2"]
CFG = ["inf/guidance@pairs.guidance=cfg", "pairs.guidance.weight=1.5"]
HOW = {"solver": HeunSigma(), "grid": EDM(), "nfe": 9, "t_max": T_MAX}


@pytest.fixture
def teacher(tmp_path):
    """A conditional flow that knows missing labels."""
    path = teacher_file(tmp_path / "teacher.safetensors", *TWO, exact=False)
    files.save(files.load(path), path, files.describe(path) | {"label_dropout": 0.1})
    return path


@pytest.fixture
def weak(tmp_path):
    torch.manual_seed(7)
    return teacher_file(tmp_path / "weak.safetensors", *TWO, "net.network.num_classes=0", "net.network.width=8", exact=False)


@pytest.fixture
def cfg(tmp_path, teacher):
    words = ["teacher=run", f"teacher.path={teacher}", *TWO, "training.start=scratch"]
    return lambda *more, verb="pairs": config(verb, tmp_path / "outputs", *words, *more)


def auto(weak):
    return [
        "inf/guidance@pairs.guidance=auto",
        f"pairs.guidance.path={weak}",
        "pairs.guidance.weight=2",
        "pairs.guidance.low=0.3",
    ]


def unlabelled(network):
    return lambda x, t, s=None, *, label=None, lam_guid=None: network(x, t, label=torch.full_like(label, NO_LABEL))


def test_backward_pairs_are_the_guided_flows(cfg, teacher, weak):
    network, x1, label = files.load(teacher), pair_noise(1000, np.arange(96), (2,)), pair_labels(1000, np.arange(96), 2)
    led = {"cfg": Guided(network, unlabelled(network), 1.5), "auto": Guided(network, files.load(weak), 2.0, 0.3)}
    plain = sample(network, x1, label=label, **HOW)
    for kind, words in {"cfg": CFG, "auto": auto(weak)}.items():
        batch = pairs.ensure(cfg(*words), "backward").read(np.arange(96))
        torch.testing.assert_close(batch.x0, sample(led[kind], x1, label=label, **HOW), rtol=1e-4, atol=1e-4)
        assert (batch.x0 - plain).abs().max() > 0.01 and torch.equal(batch.label, label)


def test_forward_pairs_are_the_guided_flows(cfg, teacher):
    store, network = pairs.ensure(cfg(*CFG), "forward"), files.load(teacher)
    x0, label = TwoMoons(num_points=400).split("train").take(np.arange(64))
    led = invert(Guided(network, unlabelled(network), 1.5), x0, label=label, **HOW)
    torch.testing.assert_close(store.read(np.arange(64)).x1, led, rtol=1e-3, atol=1e-3)
    assert (led - invert(network, x0, label=label, **HOW)).abs().max() > 0.01


def test_online_pairs_are_the_guided_flows(cfg, teacher):
    settings = cfg(*CFG, "lrn/coupling=online", verb="train")
    source, network = open_online(settings), files.load(teacher)
    batch = source.read(np.arange(16), 32)
    led = sample(Guided(network, unlabelled(network), 1.5), batch.x1, label=batch.label, **HOW)
    torch.testing.assert_close(batch.x0, led, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in source.velocity.parameters())
    assert plan(settings).key != plan(cfg("lrn/coupling=online", verb="train")).key


def test_the_recipe_holds_the_guidance_and_nothing_where_there_is_none(cfg, weak, tmp_path):
    def recipe(*words):
        return pairs.plan(cfg(*words), "backward").recipe["guidance"]

    assert recipe() is None and recipe(*CFG, "pairs.guidance.weight=0") is None
    assert recipe(*CFG) == {"kind": "cfg", "weight": 1.5, "low": 0.0, "high": 1.0, "guide": None}
    assert recipe(*auto(weak)) == {"kind": "auto", "weight": 2.0, "low": 0.3, "high": 1.0, "guide": files.weights_hash(weak)}
    before = pairs.plan(cfg(*auto(weak)), "backward").key
    moved = weak.rename(tmp_path / "moved.safetensors")
    assert pairs.plan(cfg(*auto(moved)), "backward").key == before
    assert pairs.plan(cfg(*auto(moved), "pairs.guidance.weight=1"), "backward").key != before


def test_the_store_says_so_and_is_verified(cfg, weak, capsys):
    for words, said in ((CFG, "guidance cfg 1.5;"), (auto(weak), "guidance auto 2 for t in [0.3, 1] by ")):
        folder = pairs.pairs(cfg(*words))
        assert cli.main(["store", "info", str(folder)]) == 0
        assert said in capsys.readouterr().out
        assert cli.main(["store", "verify", str(folder), "--batches", "4"]) == 0
        assert "to the last bit" in capsys.readouterr().out
    weak.unlink()
    assert cli.main(["store", "verify", str(folder)]) == 2
    assert f"{weak}: no such file" in capsys.readouterr().err


def test_mistakes(cfg, tmp_path):
    with pytest.raises(UserError, match=r"^pairs.guidance.path=None: needs a run folder"):
        pairs.plan(cfg("inf/guidance@pairs.guidance=auto"), "backward")
    plain = teacher_file(tmp_path / "plain.safetensors", exact=False)
    with pytest.raises(UserError, match=r"^pairs.guidance=cfg: this flow is unconditional"):
        pairs.plan(cfg(*CFG, f"teacher.path={plain}", "net.network.num_classes=0"), "backward")
    assert parts.net_classes(cfg()) == 2
