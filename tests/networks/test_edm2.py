"""What is EDM2's own: magnitudes that stay, and weights that are kept normal while training."""

import edm_format
import filled
import pytest
import torch
from torch.func import jvp

from reflow_lab.networks.edm2 import EDM2, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalised

NUM = 20_000


def rms(x):
    return x.square().mean().sqrt().item()


def tiny(**changed):
    network = EDM2(3, 8, channels=64, multipliers=(1,), num_blocks=1, attention_resolutions=(8,), **changed)
    network.load_state_dict({key: filled.weight(key, value.shape) for key, value in network.state_dict().items()})
    return network


def weights(network):
    return {name: module.weight for name, module in network.named_modules() if isinstance(module, MPConv)}


def test_every_operation_keeps_the_magnitude():
    """Of independent normal inputs; mp_silu's divisor is that of its expectation."""
    a, b = torch.randn(2, NUM, 32).unbind()
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert rms(mp_sum(a, b, 0.3)) == pytest.approx(1, abs=0.01)
    assert rms(MPConv(32, 16)(a)) == pytest.approx(1, abs=0.02)
    assert rms(MPFourier(64)(3 * torch.randn(NUM))) == pytest.approx(1, abs=0.05)
    assert rms(normalised(7 * a, 1)) == pytest.approx(1, abs=0.001)


def test_both_sides_of_a_concatenation_contribute_alike():
    a, b = torch.randn(2000, 8, 2, 2), torch.randn(2000, 24, 2, 2)
    joined = mp_cat(a, b)
    assert joined.shape == (2000, 32, 2, 2) and rms(joined) == pytest.approx(1, abs=0.01)
    assert joined[:, :8].square().sum().item() == pytest.approx(joined[:, 8:].square().sum().item(), rel=0.02)


def test_the_size_of_the_stored_weights_does_not_matter():
    layer, x = MPConv(8, 4, 3, 3), torch.randn(2, 8, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 100
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)


def test_a_fresh_deep_network_keeps_its_activations():
    """Of magnitude 1 to within a factor, at every block, without any group norm."""
    network, seen = EDM2(3, 32, channels=64, multipliers=(1, 1, 1), num_blocks=2), []
    for block in (*network.enc.values(), *network.dec.values()):
        block.register_forward_hook(lambda _module, _args, out: seen.append(rms(out)))
    with torch.no_grad():
        network.eval()(torch.randn(4, 3, 32, 32), torch.rand(4))
    assert len(seen) == 9 + 13 and all(0.7 < size < 1.3 for size in seen)


def test_activations_are_clipped():
    block = tiny().dec["8x8_in1"].eval()
    assert block(1e4 * torch.randn(2, 64, 8, 8), torch.randn(2, 64)).abs().max() == 256


def test_training_keeps_the_weights_normal():
    """After an optimiser's step the next pass brings every output's weights back to root mean square 1."""
    network, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.rand(2)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    network(x, t).square().mean().backward()
    optimiser.step()
    assert any(abs(rms(row) - 1) > 1e-2 for weight in weights(network).values() for row in weight)
    network(x, t)
    assert all(rms(row) == pytest.approx(1, abs=1e-3) for weight in weights(network).values() for row in weight)


def test_forced_weights_are_the_originals():
    """The original's stored weights after one training pass."""
    for name in ("edm2", "edm2_labels"):
        cases, outputs = edm_format.original("edm2")
        key = "unet.enc.8x8_block0.conv_res0.weight"
        layer = MPConv(64, 64, 3, 3)
        layer.weight.data = filled.weight(key, cases[name]["state"][key])
        torch.testing.assert_close(layer.unit()[:2], outputs[f"{name}/forced"])


def test_two_passes_may_come_before_the_backward_one():
    network, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.rand(2)
    (network(x, t).sum() + network(x, t).sum()).backward()
    twice = network.out_gain.grad.clone()
    network.out_gain.grad = None
    network(x, t).sum().backward()
    torch.testing.assert_close(twice, 2 * network.out_gain.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["evaluation", "no gradients", "forward mode"])
def test_otherwise_the_stored_weights_stay(how):
    network, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.rand(2)
    before = {name: weight.clone() for name, weight in weights(network).items()}
    if how == "evaluation":
        network.eval()(x, t)
    elif how == "no gradients":
        with torch.no_grad():
            network(x, t)
    else:
        jvp(lambda x: network(x, t), (x,), (x,))
    assert all(torch.equal(before[name], weight) for name, weight in weights(network).items())
