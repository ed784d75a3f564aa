"""The first phase of distillation: what stands for time learns to stand for the teacher's."""

import pytest
import torch

from reflow_lab.flow_maps.alignment import align, embedder, times
from reflow_lab.networks.embedding import Aim, FourierTime
from reflow_lab.networks.mlp import MLP


@pytest.fixture(scope="module")
def aligned():
    torch.manual_seed(0)
    teacher, network = MLP(2, width=16), MLP(2, width=16, jumps=True)
    teacher.conditioning.time[0] = FourierTime(64, 4.0)  # untrained layers would keep all that quicker features bring
    network.load_state_dict({**network.state_dict(), **teacher.state_dict()})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    return teacher, network, before, align(network, teacher, 200, 0, lr=5e-3)


def test_the_error_falls(aligned):
    errors = aligned[3]
    assert len(errors) == 11
    assert errors[0] > 0.5 and errors[-1] < 0.03


def test_nothing_else_changes(aligned):
    _, network, before, _ = aligned
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".jump.time." in f".{name}" for name in changed)


def test_the_flow_map_is_then_nearly_the_velocity_wherever_it_aims(aligned):
    teacher, network, _, _ = aligned
    t = times(1, 0)
    x = torch.randn(len(t), 2, generator=torch.Generator().manual_seed(0))
    for s in (t, 0 * t):
        made = network(x, t, aim=Aim(s, torch.ones_like(t)))
        assert (made - teacher(x, t)).square().mean() < 0.01 * teacher(x, t).square().mean()


def test_its_derivative_in_time_stays_small(aligned):
    teacher, network, _, _ = aligned
    t = torch.linspace(0.02, 0.98, 200)
    slope = torch.autograd.functional.jacobian(lambda t: embedder(teacher).time_features(t).sum(0), t).norm()
    aim = Aim(0 * t, torch.ones_like(t))
    ours = torch.autograd.functional.jacobian(lambda t: embedder(network).time_features(t, aim).sum(0), t).norm()
    assert ours < slope


def test_times_reach_both_ends():
    t = times(0, 3)
    assert t.min() < 0.004 and t.max() > 0.98 and torch.equal(t, times(0, 3)) and not torch.equal(t, times(0, 4))
