"""Guidance and labels in the verbs `sample` and `evaluate` and in Python, at two moons with classes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from reflow_lab import api, parts
from reflow_lab.errors import UserError
from reflow_lab.evaluation import evaluate
from reflow_lab.flow import NO_LABEL, T_MAX
from reflow_lab.hydra_errors import explain
from reflow_lab.inf.guidance import Auto, ClassifierFree
from reflow_lab.inf.sample import sample
from reflow_lab.inf.solvers import Euler
from reflow_lab.networks import files
from tiny import composed


def weights(path: Path, width: int, seed: int, num_classes: int = 2, **about) -> Path:
    """A conditional network for points, of random weights."""
    cfg = composed(
        "train", "experiment=toy_base", f"net.network.width={width}", f"net.network.num_classes={num_classes}", f"seed={seed}"
    )
    description = {"net": parts.plain(cfg.net), "shape": [2], "num_classes": num_classes, "t_max": T_MAX, **about}
    files.save(parts.network(cfg), path, description)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flows")


@pytest.fixture(scope="module")
def flow(folder):
    """A flow that knows missing labels."""
    return weights(folder / "flow.safetensors", 32, 0, label_dropout=0.1)


@pytest.fixture(scope="module")
def weak(folder):
    """A smaller one that takes no labels."""
    return weights(folder / "weak.safetensors", 16, 1, num_classes=0)


@pytest.fixture
def draw(toy, flow, tmp_path):
    """Points that the verb writes."""

    def drawn(*more):
        words = [f"run={flow}", "num_images=6", "nfe=3", f"out={tmp_path}/points.npz", *more]
        with np.load(sample(toy.config("sample", *words)), allow_pickle=False) as file:
            return torch.from_numpy(file["samples"])

    return drawn


CFG = ["inf/guidance=cfg", "inf.guidance.weight=1.5"]


def euler(velocity, x1):
    """One step from noise: x1 t_max - t_max v."""
    x = T_MAX * x1
    return x - T_MAX * velocity(x, torch.full((len(x1),), T_MAX))


def test_classifier_free_guidance_in_one_step(draw, flow):
    """The verb's one-step samples by hand: the network with its label and without."""
    network, label = files.load(flow), torch.ones(6, dtype=torch.int64)
    x1 = api.pair_noise(0, np.arange(6), (2,))
    with torch.no_grad():
        given, none = (euler(partial(network, label=y), x1) for y in (label, label * 0 + NO_LABEL))
    found = draw(*CFG, "label=1", "nfe=1")
    torch.testing.assert_close(found, given + 1.5 * (given - none), rtol=1e-4, atol=1e-4)
    assert (found - given).abs().max() > 0.01
    torch.testing.assert_close(draw("label=1", "nfe=1"), given, rtol=1e-4, atol=1e-4)


def test_autoguidance_in_one_step(draw, flow, weak):
    x1, label = api.pair_noise(0, np.arange(6), (2,)), torch.ones(6, dtype=torch.int64)
    with torch.no_grad():
        strong, less = (euler(partial(files.load(path), label=label), x1) for path in (flow, weak))
    found = draw("inf/guidance=auto", f"inf.guidance.path={weak}", "inf.guidance.weight=2", "label=1", "nfe=1")
    torch.testing.assert_close(found, strong + 2 * (strong - less), rtol=1e-4, atol=1e-4)


def test_the_verb_draws_what_python_draws(draw, flow, weak, capsys):
    loaded = api.load(flow)
    how = {"seed": 0, "label": torch.tensor([0, 1, 0, 1, 1, 0])}
    labels = "label=[0,1,0,1,1,0]"
    for words, guidance in {
        (): None,
        (*CFG, "inf.guidance.low=0.3"): ClassifierFree(weight=1.5, low=0.3),
        ("inf/guidance=auto", f"inf.guidance.path={weak}"): Auto(path=weak, weight=0.7),
    }.items():
        torch.testing.assert_close(draw(labels, *words), api.sample(loaded, 6, 3, guidance=guidance, **how), rtol=1e-5, atol=1e-5)
    assert "6 samples, guidance auto 0.7 by " in capsys.readouterr().out
    assert torch.equal(draw(*CFG, "inf.guidance.weight=0"), draw())


def test_a_label_is_that_class_for_all(draw):
    both = draw()
    zeros, ones = draw("label=0"), draw("label=1")
    assert torch.equal(draw("label=[1,1,1,1,1,1]"), ones)
    same = [(both[i] == zeros[i]).all() or (both[i] == ones[i]).all() for i in range(6)]
    assert not torch.equal(zeros, ones) and all(same) and not torch.equal(both, zeros)


def test_the_precision_is_the_guides_too(toy, flow, weak):
    cfg = toy.config("evaluate", "precision=bf16-mixed", "inf/guidance=auto", f"inf.guidance.path={weak}")
    run = parts.described(flow, parts.data_source(cfg), "run")
    guided = parts.velocity(cfg, run)
    assert guided.velocity.dtype == guided.reference.dtype == torch.bfloat16
    assert not guided.training and instantiate(cfg.inf.guidance).weight == guided.weight == 0.7


MISTAKES = [
    (["label=2"], r"label=2\.\.2: must lie in 0\.\.1"),
    (["label=[0,1]"], r"label=\(2,\): must have the shape \(6,\)"),
    (["label=cat"], "label=cat: must be a class"),
    (["label=true"], "label=True: must be a class"),
    (["label=[0,1,a,1,1,1]"], r"label=\[0, 1, 'a', 1, 1, 1\]: must be a class"),
    (["label=1", "run=weak"], "label=given: must be omitted: this flow is unconditional"),
    ([*CFG, "run=weak"], "inf.guidance=cfg: this flow is unconditional"),
    ([*CFG, "inf.guidance.weight=nan"], "guidance.weight=nan: must be a finite number"),
    ([*CFG, "inf.guidance.low=0.5", "inf.guidance.high=0.4"], "guidance.high=0.4: must lie above guidance.low=0.5"),
    (["inf/guidance=auto"], "inf.guidance.path=None: needs a run folder"),
    (["inf/guidance=auto", "inf.guidance.path=other"], r"inf.guidance.path=.*: makes samples of shape \(1, 32, 32\)"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES)
def test_mistakes(draw, toy, weak, no_network, words, line):
    """One line each, the configuration's own errors worded as the command line words them."""
    names = {"run=weak": f"run={weak}", "inf.guidance.path=other": "inf.guidance.path=package:fashion_mnist.safetensors"}
    with pytest.raises(Exception) as caught:
        draw(*(names.get(word, word) for word in words))
    found = explain(caught.value, "sample")
    assert found is not None and "\n" not in found
    with pytest.raises(UserError, match=f"^{line}"):
        raise UserError(found)


# The verb `evaluate`


@pytest.fixture
def measure(toy, flow):
    return lambda *more: evaluate.evaluate(toy.config("evaluate", f"run={flow}", "nfe=3", "inf/solver=euler", *more))


def test_an_evaluation_counts_both_networks(measure, weak, capsys):
    """Times of three uniform steps: t_max, 2/3 and 1/3 of it."""
    plain, led = measure("inf/grid=uniform"), measure("inf/grid=uniform", *CFG)
    inner = measure("inf/grid=uniform", "inf/guidance=auto", f"inf.guidance.path={weak}", "inf.guidance.high=0.7")
    assert [(m["nfe"], m["network_calls"]) for m in (plain, led, inner)] == [(3, 3), (3, 6), (3, 5)]
    assert len({m["fd_points"] for m in (plain, led, inner)}) == 3 and len({m["straightness"] for m in (plain, led, inner)}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "nfe 3: " in lines[1] and "nfe 3, network calls 6: " in lines[3] and "nfe 3, network calls 5: " in lines[5]
    assert ", cfg 1.5: " in lines[2] and f", auto 0.7 for t in [0, 0.7] by {files.weights_hash(weak)}: " in lines[4]


def test_the_protocol_holds_the_guidance(measure, weak):
    assert measure()["protocol"]["guidance"] is None
    led = {"kind": "cfg", "weight": 1.5, "low": 0.0, "high": 1.0, "guide": None}
    assert measure(*CFG)["protocol"]["guidance"] == led
    words = ["inf/guidance=auto", f"inf.guidance.path={weak}"]
    assert measure(*words)["protocol"]["guidance"]["guide"] == files.weights_hash(weak)


def test_a_weight_of_none_is_the_unguided_cell(measure, no_memory, request):
    first = measure("nfe=4")
    request.getfixturevalue("no_network")
    assert measure("nfe=4", *CFG, "inf.guidance.weight=0") == first
    with pytest.raises(AssertionError, match="a network was called"):
        measure("nfe=4", *CFG)


def test_what_is_sampled_is_what_is_measured(measure, flow, toy):
    """The first stored samples are those that Python draws from the same noise."""
    kept = np.load(Path(measure(*CFG)["folder"]) / "samples.npy", allow_pickle=False)
    cfg, guidance = toy.config("evaluate"), ClassifierFree(weight=1.5)
    drawn = api.sample(api.load(flow), len(kept), 3, cfg.evaluation.seed, solver=Euler(), guidance=guidance)
    torch.testing.assert_close(torch.from_numpy(kept), drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("words", "line"), [MISTAKES[i] for i in (6, -1)])
def test_mistakes_in_an_evaluation(measure, weak, no_network, words, line):
    names = {"run=weak": f"run={weak}", "inf.guidance.path=other": "inf.guidance.path=package:fashion_mnist.safetensors"}
    with pytest.raises(Exception) as caught:
        measure(*(names.get(word, word) for word in words))
    with pytest.raises(UserError, match=f"^{line}"):
        raise UserError(explain(caught.value, "evaluate"))
