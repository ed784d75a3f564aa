from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.training.ema import EMA, ema_name, snapshot_name
from reflow_lab.training.module import FlowModule
from reflow_lab.training.power_ema import sigma_rel_to_gamma

BATCH = 100


def module():
    return FlowModule(nn.Linear(2, 1), nn.Module(), None, batch_size=BATCH, lr=1, seed=0)


def walk(ema, flow, steps, first=1):
    """Move the weights; return the averages of the first weight by the recursion, written out, for half-lives in images."""
    for step in range(first, first + steps):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.copy_(torch.sin(parameter + step))
        yield flow.velocity.weight[0, 0].item()
        ema.on_train_batch_end(SimpleNamespace(global_step=step), flow)


def test_the_averages_follow_edms_recursion():
    """beta = 0.5^(batch / min(halflife, 0.05 images seen))."""
    ema, flow = EMA([0.0002, 0.5]), module()
    ema.on_fit_start(None, flow)
    expected = dict.fromkeys(ema.averages, flow.velocity.weight[0, 0].item())
    for step, value in enumerate(walk(ema, flow, 100), start=1):
        for name, halflife in (("ema0.0002", 200), ("ema0.5", 500_000)):
            beta = 0.5 ** (BATCH / min(halflife, 0.05 * step * BATCH))
            expected[name] = beta * expected[name] + (1 - beta) * value
    assert set(expected) == {"ema0.0002", "ema0.5"}
    for name, value in expected.items():
        assert ema.averages[name][0][0, 0].item() == pytest.approx(value, abs=1e-5)
    assert abs(expected["ema0.5"] - expected["ema0.0002"]) > 1e-3


def test_the_weights_themselves_are_never_touched():
    averaged, alone = module(), module()
    alone.load_state_dict(averaged.state_dict())
    ema = EMA([0.1])
    ema.on_fit_start(None, averaged)
    list(walk(ema, averaged, 10))
    list(walk(SimpleNamespace(on_train_batch_end=lambda *_: None), alone, 10))
    assert torch.equal(averaged.velocity.weight, alone.velocity.weight)
    assert not torch.equal(ema.averages["ema0.1"][0], alone.velocity.weight)


def test_saved_and_restored_it_goes_on_alike():
    whole, flow = EMA([0.01]), module()
    whole.on_fit_start(None, flow)
    list(walk(whole, flow, 5))
    state = {"averages": {n: [p.clone() for p in average] for n, average in whole.state_dict()["averages"].items()}}
    later = EMA([0.01])
    later.load_state_dict(state)
    later.on_fit_start(None, flow)
    weights = [p.detach().clone() for p in flow.parameters()]
    list(walk(whole, flow, 5, first=6))
    with torch.no_grad():
        torch._foreach_copy_(list(flow.parameters()), weights)
    list(walk(later, flow, 5, first=6))
    assert all(torch.equal(a, b) for a, b in zip(whole.averages["ema0.01"], later.averages["ema0.01"], strict=True))


def test_an_average_can_be_put_into_a_network():
    ema, flow = EMA([0.01]), module()
    ema.on_fit_start(None, flow)
    list(walk(ema, flow, 3))
    other = nn.Linear(2, 1)
    ema.copy_to("ema0.01", other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ema.averages["ema0.01"], strict=True))


def test_names_are_short_and_values_checked():
    assert [ema_name(h) for h in (0.5, 0.002, 10, 1e-4)] == ["ema0.5", "ema0.002", "ema10", "ema0.0001"]
    with pytest.raises(UserError, match=r"training\.ema_halflives_mimg=0: half-lives must be positive"):
        EMA([0.5, 0])


def test_power_function_averages_beside_the_others():
    """sigma_rel: beta = (before / after)^(gamma + 1); the first step takes the weights as they are."""
    ema, flow = EMA([0.5], [0.05, 0.1]), module()
    assert list(ema.betas) == ["ema0.5", "sigma0.05", "sigma0.1"]
    ema.on_fit_start(None, flow)
    history = list(walk(ema, flow, 50))
    for name, width in (("sigma0.05", 0.05), ("sigma0.1", 0.1)):
        ends = (torch.arange(51, dtype=torch.float64) / 50) ** (sigma_rel_to_gamma(width) + 1)
        expected = (ends.diff() * torch.tensor(history, dtype=torch.float64)).sum().item()
        assert ema.averages[name][0][0, 0].item() == pytest.approx(expected, abs=1e-5)
    assert abs(history[-1] - expected) > 1e-3


def test_snapshot_names_tell_every_image_apart():
    assert snapshot_name(1_280_064, 0.05) == "0001280.064kimg-0.050.safetensors"
    assert snapshot_name(32, 0.1) == "0000000.032kimg-0.100.safetensors"
