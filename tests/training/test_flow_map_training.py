"""Flow maps of every network of the lab in the trainer: in both precisions, compiled or not, by one process or two."""

import json
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from test_ddp import assert_same, folder_of, two

from reflow_lab import parts
from reflow_lab.flow import T_MAX
from reflow_lab.flow_maps import derivatives
from reflow_lab.networks import files
from reflow_lab.training.train import train
from tiny import composed

SONG = {"channels": 16, "multipliers": "[1]", "num_blocks": 1, "attention_resolutions": "[8]"}
WIDE = SONG | {"channels": 64}  # a head has 64 channels
TINY = {
    "mlp": {"width": 16},
    "unet_small": {"channels": 8, "multipliers": "[1]", "num_blocks": 1},
    "ddpmpp": SONG,
    "ncsnpp": SONG | {"multipliers": "[1,1]"},
    "adm": WIDE,
    "edm2_xs": WIDE,
}
BATCH = 4
PRECISIONS = ["32-true", "bf16-mixed"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def config(images, outputs, net, steps, *more):
    """A flow map of a random teacher."""
    folder = ["data=folder", f"data.path={images}", "data.resolution=8"]
    data = ["data=gaussian", "data.num_points=400"] if net == "mlp" else folder
    sizes = [f"net={net}", *(f"net.network.{key}={value}" for key, value in TINY[net].items()), "net.network.dropout=0.1"]
    cfg = composed("train", "~experiment", *data, *sizes, "teacher=none", "training=base_flow", "lrn=base_flow")
    torch.manual_seed(0)
    about = {"net": parts.plain(cfg.net), "shape": list(parts.sample_shape(parts.data_source(cfg))), "num_classes": 0}
    path = outputs.parent / f"teacher_of_{outputs.name}.safetensors"
    files.save(instantiate(cfg.net), path, about | {"t_max": T_MAX})
    budget = [f"training.batch_size={BATCH}", f"training.total_kimg={BATCH * steps / 1000}", "training.num_heldout=4"]
    budget += ["training.lr=1e-3", "training.warmup_kimg=0", "training.ema_halflives_mimg=[]", "flow_map.align_steps=20"]
    budget += [f"flow_map.warmup_steps={steps // 2}", f"trainer.log_every_kimg={BATCH * steps / 4000}", "nfe=2"]
    chosen = ["flow_map=ayf", "training=flow_map", "lrn=flow_map", "inf=flow_map", "teacher=run", f"teacher.path={path}"]
    return composed("train", "~experiment", *data, *sizes, *chosen, *budget, "trainer=cpu", f"outputs={outputs}", *more)


def assert_sound(folder, cfg):
    """Its weights moved, to finite ones, and so are all figures on the way."""
    start, learned = files.load(cfg.teacher.path).state_dict(), files.load(files.find(folder, "raw")).state_dict()
    assert all(value.isfinite().all() for value in learned.values())
    moved = [key for key in start if not torch.equal(start[key], learned[key])]
    assert len(moved) > len(start) / 2 and learned["network." + last(learned)].any()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 4
    assert all(math.isfinite(value) for line in lines for value in line.values())


def last(state):
    """The layer by which s and lam_guid come in, which starts at zero."""
    (found,) = (key for key in state if key.endswith("jump.aim.3.weight"))
    return found.removeprefix("network.")


@pytest.fixture
def backend(monkeypatch):
    """What compiles in the place of inductor, which takes minutes for each network."""
    compiling = torch.compile

    def use(name):
        torch._dynamo.reset()
        derivatives.compiled_product.cache_clear()
        monkeypatch.setattr(torch, "compile", lambda made, options=None, **more: compiling(made, backend=name, **more))

    yield use
    derivatives.compiled_product.cache_clear()


@pytest.mark.parametrize("net", TINY)
def test_every_network_becomes_a_flow_map(images, tmp_path, net):
    cfg = config(images, tmp_path / "out", net, 20, f"precision={PRECISIONS[list(TINY).index(net) % 2]}", "lrn/dropout=half")
    assert_sound(train(cfg), cfg)


@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
def test_two_processes_train_the_flow_map_that_one_does(images, tmp_path, derivative):
    """Losses, gradients' norms and weights, to rounding."""
    words = ["precision=32-true", f"flow_map/derivative={derivative}"]
    one = train(config(images, tmp_path / "one", "unet_small", 8, *words))
    assert two(config(images, tmp_path / "two", "unet_small", 8, *words, "trainer.devices=2")) == [0, 0]
    assert_same(one, folder_of(tmp_path / "two"), 1e-4)


@pytest.mark.slow
def test_compiled_training_is_the_same_training(images, tmp_path, backend):
    """With dropout: a compiled step's derivative drops the same units."""
    backend("eager")
    words = ["precision=32-true", "lrn/dropout=half"]
    plain = train(config(images, tmp_path / "plain", "mlp", 8, *words))
    compiled = train(config(images, tmp_path / "compiled", "mlp", 8, *words, "training.compile=true"))
    ours, theirs = (files.load(files.find(folder, "raw")).state_dict() for folder in (compiled, plain))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", TINY)
def test_500_steps_without_a_nan(images, tmp_path, net, precision, compiled, processes, backend):
    """Compiled by aot_eager, which has the graphs of inductor but not its kernels."""
    if compiled:
        backend("aot_eager")
    words = [f"precision={precision}", f"training.compile={str(compiled).lower()}", f"trainer.devices={processes}"]
    cfg = config(images, tmp_path / "out", net, 500, *words)
    folder = train(cfg) if processes == 1 else None
    if processes == 2:
        assert two(cfg) == [0, 0]
        folder = folder_of(tmp_path / "out")
    assert_sound(folder, cfg)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_500_steps_compiled_by_inductor(images, tmp_path, precision):
    torch._dynamo.reset()
    derivatives.compiled_product.cache_clear()
    cfg = config(images, tmp_path / "out", "mlp", 500, f"precision={precision}", "training.compile=true", "lrn/dropout=half")
    assert_sound(train(cfg), cfg)
