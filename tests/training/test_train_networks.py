"""Every network in the trainer: a few steps at tiny size, from scratch, on images of two classes."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from reflow_lab import parts
from reflow_lab.networks import files
from reflow_lab.networks.edm2 import MPConv
from reflow_lab.training import train as training
from reflow_lab.training.ema import EMA
from reflow_lab.training.train import train
from tiny import composed

SMALL = {"channels": 32, "multipliers": "[1,2]", "num_blocks": 1}
WIDE = {"channels": 64, "multipliers": "[1,1]", "num_blocks": 1, "attention_resolutions": "[8]"}  # an EDM2 head has 64 channels
TINY = {
    "ddpmpp": {**SMALL, "attention_resolutions": "[8]"},
    "ncsnpp": {**SMALL, "attention_resolutions": "[8]"},
    "adm": WIDE,
    "edm2_xs": WIDE,
    "unet_small": SMALL,
}
BATCH, STEPS = 4, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(24):
        path = folder / str(k % 2) / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


def config(images, outputs, net, *more):
    data = ["data=folder", f"data.path={images}", "data.resolution=16", "data.num_classes=2"]
    sizes = [f"net.network.{key}={value}" for key, value in ({"num_classes": 2} | TINY[net]).items()]
    budget = [f"training.batch_size={BATCH}", f"training.total_kimg={BATCH * STEPS / 1000}", "training.num_heldout=4"]
    chosen = ["training=base_flow", "lrn=base_flow", "teacher=none", "trainer=cpu", "training.warmup_kimg=0", *more]
    return composed("train", "~experiment", *data, f"net={net}", *sizes, *budget, *chosen, f"outputs={outputs}")


@pytest.mark.parametrize("net", TINY)
def test_every_network_trains(images, tmp_path, net):
    """Its weights move, to finite ones, and the file that is left computes what they do."""
    cfg = config(images, tmp_path, net)
    start, folder = training.start(cfg), train(cfg)
    learned = files.load(files.find(folder, "raw"))
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), learned.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2 and all(p.isfinite().all() for p in learned.parameters())
    about = files.describe(files.find(folder))
    assert about["shape"] == [3, 16, 16] and about["num_classes"] == 2
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), torch.tensor([0, 1])
    with torch.no_grad():
        assert learned(x, t, label=label).isfinite().all()


def test_edm2s_weights_are_kept_normal_by_training_itself(images, tmp_path):
    """Each pass that records gradients brings every output's weights to root mean square 1, so a step starts from there.

    Without that, Adam at this rate takes them away from 1 and further with every step.
    """
    cfg = config(images, tmp_path, "edm2_xs", "training.lr=0.05", "training.gradient_clip=null")
    network, sizes = instantiate(cfg.net), []

    def note(module, _):
        if torch.is_grad_enabled():
            sizes.append(max((spread(m) for m in module.modules() if isinstance(m, MPConv)), default=0.0))

    network.network.enc["16x16_conv"].register_forward_pre_hook(lambda *_: note(network, _))
    parts.check(cfg)
    training.optimise(cfg, tmp_path, network, EMA([]), STEPS)
    assert len(sizes) == STEPS and max(sizes) < 3e-3
    assert max(spread(m) for m in network.modules() if isinstance(m, MPConv)) > 1e-2  # after the last step nothing does


def spread(layer):
    """How far an output's weights are from root mean square 1, at most."""
    rms = layer.weight.detach().flatten(1).square().mean(1).sqrt()
    return (rms - 1).abs().max().item()
