"""What a network is as a flow map before any training: the velocity that it starts from, or the flow map of Gaussian data."""

import pytest
import torch
from torch import nn

import jumpers
from reflow_lab.flow import flow_map
from reflow_lab.flow_maps.alignment import align
from reflow_lab.gaussian import Gaussian
from reflow_lab.networks.embedding import Aim
from reflow_lab.networks.preconditioning import Preconditioned

STEPS = 300
#: relative error after STEPS, at most: features of high frequency, random here, cannot be learned well, nor are they wanted
ALIGNED = {"mlp": 0.5, "unet": 0.5, "ddpmpp": 3e-3, "ncsnpp": 0.8, "adm": 3e-3, "edm2": 0.25}


class Zero(nn.Module):
    jumps = True

    def forward(self, x, t, label=None, aim=None):
        return torch.zeros_like(x)


def started(name):
    """A velocity and a fresh flow map with its weights, in evaluation."""
    velocity, fresh = jumpers.made(name, jumps=False).eval(), Preconditioned(jumpers.NETWORKS[name](jumps=True)).eval()
    missing, unexpected = fresh.load_state_dict(velocity.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith("network.") and ".jump." in f".{key}" for key in missing)
    return velocity, fresh


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_with_a_zero_network_it_is_the_flow_map_of_gaussian_data(sigma_data):
    x, grid = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0, 1, 21, dtype=torch.float64)
    data, model = Gaussian(0.0, sigma_data), Preconditioned(Zero(), sigma_data)
    for t in grid:
        for s in grid[grid <= t]:
            jumped = flow_map(model(x, t, s), x, t, s)
            assert (jumped - data.flow_map(x, t, s)).abs().max() < 1e-12


@pytest.mark.parametrize("name", jumpers.NETWORKS)
def test_a_fresh_flow_map_answers_the_same_whatever_s_and_lam_guid(name):
    _, fresh = started(name)
    x, _, t, s, label, lam_guid = jumpers.batch(name)
    expected = fresh.network(x, t, label, aim=Aim(t, lam_guid))
    for there in (s, torch.zeros_like(t)):
        assert torch.equal(fresh.network(x, t, label, aim=Aim(there, lam_guid / 2)), expected)


@pytest.mark.parametrize("name", ALIGNED)
def test_alignment_makes_it_its_velocity(name):
    """To the error that is left of the time embedding, and the same for all s."""
    velocity, fresh = started(name)
    x, _, t, s, label, lam_guid = jumpers.batch(name)
    others = {key: value.clone() for key, value in fresh.state_dict().items() if ".jump.time." not in key}
    before = missed(velocity, fresh, x, t, s, label, lam_guid)
    errors = align(fresh.network, velocity.network, STEPS, seed=0)
    assert len(errors) == 11 and errors[-1] < ALIGNED[name] and errors[-1] < 0.9 * errors[0]
    assert all(torch.equal(value, others[key]) for key, value in fresh.state_dict().items() if key in others)
    after = missed(velocity, fresh, x, t, s, label, lam_guid)
    assert after == missed(velocity, fresh, x, t, torch.zeros_like(t), label, lam_guid)
    assert after < (0.05 if ALIGNED[name] < 0.01 else 1) * before


@torch.no_grad()
def missed(velocity, fresh, x, t, s, label, lam_guid):
    """How far a flow map's network is from the velocity's, relative to it."""
    wanted = velocity.network(x, t, label)
    return ((fresh.network(x, t, label, aim=Aim(s, lam_guid)) - wanted).norm() / wanted.norm()).item()
