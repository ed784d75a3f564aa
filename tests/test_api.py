import doctest
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

import reflow_lab
from reflow_lab import api, parts
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.solvers import Euler, FlowMap
from reflow_lab.lrn.store import pair_noise
from reflow_lab.networks import files


@pytest.fixture(scope="module")
def flow(images):
    return reflow_lab.load(images.teacher)


@pytest.fixture(scope="module")
def conditional(images, tmp_path_factory):
    """An untrained network of ten classes that answers differently to each."""
    path = tmp_path_factory.mktemp("conditional") / "net.safetensors"
    cfg = images.config("train", "net.network.num_classes=10")
    network = instantiate(cfg.net)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    files.save(network, path, {"net": parts.plain(cfg.net), "shape": [1, 32, 32], "num_classes": 10, "t_max": T_MAX})
    return reflow_lab.load(path)


def test_the_example_of_the_docstring(images):
    test = doctest.DocTestParser().get_doctest(api.__doc__, {"run": images.teacher}, "api", None, 0)
    assert len(test.examples) == 4
    assert doctest.DocTestRunner().run(test).failed == 0


def test_load(flow, images):
    assert flow.shape == (1, 32, 32) and flow.num_classes == 0 and flow.t_max == pytest.approx(80 / 81)
    assert not flow.training and {p.dtype for p in flow.parameters()} == {torch.float32}
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([0.3, 0.9])
    assert torch.equal(flow(x, t), flow.velocity(x, t))


def vector(*source):
    """All weights of a flow, loaded from there."""
    return torch.cat([parameter.flatten() for parameter in reflow_lab.load(*source).parameters()])


def test_profiles_of_a_run(toy):
    raw, average = vector(toy.teacher, "raw"), vector(toy.teacher, "ema0.1")
    assert not torch.equal(raw, average) and torch.equal(vector(toy.teacher), average)
    assert torch.equal(vector(toy.teacher / "weights" / "raw.safetensors"), raw)
    with pytest.raises(UserError, match=r"profile=ema9: allowed: ema0\.1, raw"):
        reflow_lab.load(toy.teacher, "ema9")


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors", "package:nothing.safetensors"])
def test_what_is_not_there(path):
    with pytest.raises(UserError, match="no such file"):
        reflow_lab.load(path)


def test_samples_are_reproducible_and_keyed_by_seed_and_index(flow):
    seven = reflow_lab.sample(flow, 7, nfe=2, seed=3)
    assert seven.shape == (7, 1, 32, 32) and seven.dtype == torch.float32 and seven.device.type == "cpu"
    assert torch.equal(seven, reflow_lab.sample(flow, 7, nfe=2, seed=3))
    assert not torch.equal(seven, reflow_lab.sample(flow, 7, nfe=2, seed=4))
    for few in (reflow_lab.sample(flow, 3, nfe=2, seed=3), reflow_lab.sample(flow, 7, nfe=2, seed=3, batch_size=2)[:3]):
        torch.testing.assert_close(few, seven[:3], rtol=1e-5, atol=1e-4)


def test_one_euler_step_by_hand(flow):
    """x0 = x - t v(x, t), x = t x1: the default sampler at 1 NFE."""
    x = 0.9 * pair_noise(5, np.arange(3), flow.shape)
    with torch.no_grad():
        expected = x - 0.9 * flow(x, torch.full((3,), 0.9))
    torch.testing.assert_close(reflow_lab.sample(flow, 3, nfe=1, seed=5, t_max=0.9), expected, rtol=1e-5, atol=1e-4)


def test_the_default_sampler_is_the_improved_one(flow, images):
    inf = images.config("sample", "inf=improved").inf
    made = reflow_lab.sample(flow, 2, nfe=5, solver=instantiate(inf.solver), grid=instantiate(inf.grid))
    assert torch.equal(made, reflow_lab.sample(flow, 2, nfe=5))
    assert not torch.equal(made, reflow_lab.sample(flow, 2, nfe=5, solver=Euler(), grid=Uniform()))


def test_a_flow_map_is_sampled_by_its_own_jumps(tmp_path):
    torch.manual_seed(0)
    net = {"_target_": "reflow_lab.networks.preconditioning.Preconditioned", "sigma_data": 1.0}
    net["network"] = {"_target_": "reflow_lab.networks.mlp.MLP", "dim": 2, "width": 8, "jumps": True}
    about = {"net": net, "shape": [2], "num_classes": 0, "t_max": T_MAX}
    for name, more, gamma in (("jumps", {}, 0.0), ("to_data", {"only_to_data": True}, 1.0)):
        files.save(instantiate(net), tmp_path / f"{name}.safetensors", about | more)
        loaded = reflow_lab.load(tmp_path / f"{name}.safetensors")
        made = reflow_lab.sample(loaded, 3, nfe=2)
        assert torch.equal(made, reflow_lab.sample(loaded, 3, nfe=2, solver=FlowMap(gamma), grid=Uniform()))
        assert not torch.equal(made, reflow_lab.sample(loaded, 3, nfe=2, solver=FlowMap(0.5), grid=Uniform()))


def test_labels(conditional):
    zeros, ones = (reflow_lab.sample(conditional, 4, nfe=1, label=torch.full((4,), y)) for y in (0, 1))
    default = reflow_lab.sample(conditional, 4, nfe=1, batch_size=3)
    assert not torch.allclose(zeros, ones)
    assert torch.equal(default, reflow_lab.sample(conditional, 4, nfe=1, batch_size=3))
    torch.testing.assert_close(default[:2], reflow_lab.sample(conditional, 2, nfe=1), rtol=1e-5, atol=1e-4)


MISTAKES = {
    "nfe=0": {"nfe": 0},
    "nfe=2.5": {"nfe": 2.5},
    "t_max=0": {"t_max": 0},
    "t_max=1.1": {"t_max": 1.1},
    "num_images=0": {"num_images": 0},
    "batch_size=0": {"batch_size": 0},
    "solver=heun: must be one of reflow_lab.inf.solvers": {"solver": "heun"},
    "label=given: must be omitted": {"label": torch.zeros(2, dtype=torch.long)},
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(flow, line):
    with pytest.raises(UserError) as caught:
        reflow_lab.sample(flow, **{"num_images": 2, "nfe": 1, **MISTAKES[line]})
    assert str(caught.value).startswith(line)


UNFIT = [([0, 10], "label=0..10: must lie in 0..9"), ([-1, 0], "label=-1..0"), ([0], "label=(1,): must have")]


@pytest.mark.parametrize("label, line", UNFIT)
def test_labels_that_do_not_fit(conditional, label, line):
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        reflow_lab.sample(conditional, 2, nfe=1, label=torch.tensor(label))


def test_names_come_when_they_are_asked_for():
    script = "import sys, reflow_lab; print('torch' in sys.modules); reflow_lab.sample; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert all(getattr(reflow_lab, name) is getattr(api, name) for name in reflow_lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = reflow_lab.smaple
