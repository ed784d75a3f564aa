"""NO_LABEL in every network: its samples are as if the weights of all classes were zero, beside others in a batch."""

import copy
from functools import partial

import filled
import pytest
import torch

from reflow_lab.flow import NO_LABEL
from reflow_lab.networks.adm import ADM
from reflow_lab.networks.ddpmpp import DDPMpp
from reflow_lab.networks.edm2 import EDM2
from reflow_lab.networks.mlp import MLP
from reflow_lab.networks.ncsnpp import NCSNpp
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.networks.unet import UNet

SONG = {"channels": 16, "multipliers": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}
WIDE = {"channels": 64, "multipliers": (1, 1), "num_blocks": 1, "attention_resolutions": (4,)}
CASES = {
    "mlp": (partial(MLP, 3, width=16), "conditioning.label.weight"),
    "unet": (partial(UNet, 3, 8, channels=8), "conditioning.label.weight"),
    "ddpmpp": (partial(DDPMpp, 3, 8, **SONG), "map_label.weight"),
    "ncsnpp": (partial(NCSNpp, 3, 8, **SONG), "map_label.weight"),
    "adm": (partial(ADM, 3, 8, **WIDE), "map_label.weight"),
    "edm2": (partial(EDM2, 3, 8, **WIDE), "emb_label.weight"),
}


@pytest.fixture(params=CASES)
def pair(request):
    """A network with every path alive, the same one with the weights of its classes zero, those weights, a sample's shape."""
    make, name = CASES[request.param]
    network = make(num_classes=3).eval()
    network.load_state_dict({key: filled.weight(key, value.shape) for key, value in network.state_dict().items()})
    classless = copy.deepcopy(network)
    torch.nn.init.zeros_(classless.get_parameter(name))
    shape = (3,) if request.param == "mlp" else (3, 8, 8)
    return Preconditioned(network), Preconditioned(classless), network.get_parameter(name), shape


@torch.no_grad()
def test_a_sample_without_label_beside_others(pair):
    network, classless, _, shape = pair
    x, t = filled.drawn("x", (3, *shape)), torch.tensor([0.1, 0.5, 0.9])
    label = torch.tensor([2, NO_LABEL, 0])
    found, labelled, bare = network(x, t, label=label), network(x, t, label=label.clamp(min=1)), classless(x, t, label=label * 0)
    torch.testing.assert_close(found[1], bare[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], labelled[0], rtol=1e-5, atol=1e-6)
    assert (found - bare)[[0, 2]].flatten(1).abs().amax(1).min() > 1e-3
    assert (found[1] - labelled[1]).abs().max() > 1e-3


def test_no_label_trains_no_class(pair):
    network, _, weight, shape = pair
    x, t = filled.drawn("x", (2, *shape)), torch.tensor([0.2, 0.7])
    for label, learns in (([NO_LABEL, NO_LABEL], False), ([NO_LABEL, 1], True)):
        weight.grad = None
        network(x, t, label=torch.tensor(label)).square().sum().backward()
        assert bool(weight.grad.any()) == learns
