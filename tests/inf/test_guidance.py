"""Guidance against closed forms, what it costs, and what it refuses."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from reflow_lab.errors import UserError
from reflow_lab.flow import NO_LABEL, T_MAX
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf import guidance
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.guidance import Auto, ClassifierFree, Guidance, Guided, Unguided
from reflow_lab.inf.sampler import CountCalls, invert, sample
from reflow_lab.inf.solvers import Euler, Heun
from reflow_lab.networks import files
from reflow_lab.paths import conf_dir
from toy import teacher_file

GOOD, WEAK = Gaussian(mean=0.3, std=0.5), Gaussian(mean=-0.2, std=0.9)
X, T = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(6, 2), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)


@dataclass
class ByClass:
    """Each class a Gaussian of its own, no label another one; counts its calls."""

    calls: int = 0

    def __call__(self, x_t, t, s=None, *, label=None, lam_guid=None):
        self.calls += 1
        means = torch.where(label == NO_LABEL, -0.2, 0.3 + label.to(x_t.dtype))[:, None]
        return Gaussian(means, 0.5)(x_t, t, s)


# Values


@pytest.mark.parametrize("w", [-1.0, 0.4, 2.0])
def test_the_velocity_is_led_away_from_the_weaker_one(w):
    """For equal spreads guidance moves the mean, by w (mean - mean_ref); for others it is the formula."""
    found = Guided(GOOD, WEAK, w)(X, T)
    torch.testing.assert_close(found, (1 + w) * GOOD.velocity(X, T) - w * WEAK.velocity(X, T), rtol=1e-12, atol=1e-12)
    shifted = Gaussian(GOOD.mean + w * (GOOD.mean - 0.1), GOOD.std)
    torch.testing.assert_close(Guided(GOOD, Gaussian(0.1, GOOD.std), w)(X, T), shifted.velocity(X, T), rtol=1e-12, atol=1e-12)


def test_no_weight_is_the_velocity_itself_to_the_bit_and_asks_nobody_else():
    x, t = X.float(), T.float()
    assert torch.equal(Guided(GOOD, None, 0.0)(x, t), GOOD(x, t))


def test_samples_are_of_the_guided_mean():
    """The flow of a guided pair of Gaussians of one spread is that of the shifted Gaussian."""
    x1 = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    guided, how = Guided(GOOD, Gaussian(0.1, 0.5), 1.5), {"solver": Heun(), "grid": Uniform(), "nfe": 401}
    t = torch.tensor([T_MAX, 0.0], dtype=torch.float64)
    expected = Gaussian(0.3 + 1.5 * 0.2, 0.5).flow_map(T_MAX * x1, t[0], t[1])
    torch.testing.assert_close(sample(guided, x1, **how), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(invert(guided, sample(guided, x1, **how), **how), x1, rtol=0, atol=0.02)


def test_mean_velocities_are_guided_too():
    s = torch.tensor(0.01, dtype=torch.float64)
    expected = 1.5 * GOOD(X, T, s) - 0.5 * WEAK(X, T, s)
    torch.testing.assert_close(Guided(GOOD, WEAK, 0.5)(X, T, s), expected, rtol=1e-12, atol=1e-12)


def test_lam_guid_stands_for_one_plus_the_weight():
    lam = torch.tensor([1.0, 1.5, 2.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    expected = lam[:, None] * GOOD(X, T) + (1 - lam)[:, None] * WEAK(X, T)
    torch.testing.assert_close(Guided(GOOD, WEAK, 0.0)(X, T, lam_guid=lam), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(Guided(GOOD, WEAK, 9.0)(X, T, lam_guid=torch.tensor(3.0)), Guided(GOOD, WEAK, 2.0)(X, T))
    inside = ((T >= 0.4) & (T <= 0.6))[:, None]
    some = Guided(GOOD, WEAK, 0.0, 0.4, 0.6)(X, T, lam_guid=lam)
    torch.testing.assert_close(some, torch.where(inside, expected, GOOD(X, T)), rtol=1e-12, atol=1e-12)


def test_outside_the_interval_it_is_the_velocity_to_the_bit():
    low, high = T[1].item(), T[3].item()  # both ends belong to it
    found, inside = Guided(GOOD, WEAK, 2.0, low, high)(X, T), torch.tensor([False, True, True, True, False, False])
    assert torch.equal(found[~inside], GOOD(X, T)[~inside])
    torch.testing.assert_close(found[inside], Guided(GOOD, WEAK, 2.0)(X, T)[inside], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_one_batched_call_is_as_two(interval):
    network, label = ByClass(), torch.tensor([0, 1, 2, 0, 1, 2])
    found = Guided(network, None, 0.7, *interval)(X, T, label=label)
    assert network.calls == 1
    without = lambda x, t, s=None, *, label=None, lam_guid=None: network(x, t, label=torch.full_like(label, NO_LABEL))  # noqa: E731
    torch.testing.assert_close(Guided(network, without, 0.7, *interval)(X, T, label=label), found, rtol=1e-12, atol=1e-12)
    if interval == (0.0, 1.0):  # each class is moved away from the mean of no label
        classes = label[:, None].double()
        moved = Gaussian(0.3 + classes + 0.7 * (0.5 + classes), 0.5)
        torch.testing.assert_close(found, moved(X, T), rtol=1e-12, atol=1e-12)


def test_the_guide_sees_the_labels():
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(Guided(ByClass(), ByClass(), 5.0)(X, T, label=label), ByClass()(X, T, label=label))


def test_one_time_for_all():
    t = torch.tensor(0.5, dtype=torch.float64)
    for interval in ((0.0, 1.0), (0.4, 0.6), (0.6, 0.7)):
        whole = Guided(GOOD, WEAK, 2.0, *interval)
        assert torch.equal(whole(X, t), whole(X, t.expand(6)))


# Cost


def test_calls_are_counted():
    """Euler's 10 uniform steps from 1: times 1, 0.9, ..., 0.1, of which four lie in [0.3, 0.6]."""
    x1, how = torch.ones(4, 2, dtype=torch.float64), {"solver": Euler(), "grid": Uniform(), "nfe": 10, "t_max": 1.0}
    for velocity, calls in {
        GOOD: 10,
        Guided(GOOD, WEAK, 2.0): 20,
        Guided(GOOD, WEAK, 0.0): 10,
        Guided(GOOD, WEAK, 2.0, 0.25, 0.65): 14,
        Guided(GOOD, WEAK, 2.0, 0.25, 0.29): 10,
    }.items():
        counted, weak = CountCalls(velocity), CountCalls(WEAK)
        if isinstance(velocity, Guided):
            velocity.reference = weak
        sample(counted, x1, **how)
        assert (counted.nfe(4), counted.network_calls(4)) == (10, calls)
        assert weak.calls == calls - 10  # those that the interval saves are not made
    assert Guided(GOOD, WEAK, 1.0, 0.4, 0.6).num_guided(X, T) == 2


# What suits a flow


@pytest.fixture
def flow(tmp_path):
    path = teacher_file(tmp_path / "flow.safetensors", exact=False)
    return path, files.describe(path)


CONDITIONAL = {"shape": [2], "num_classes": 10, "label_dropout": 0.1}


def test_none_has_no_recipe_and_is_the_velocity(flow):
    for how in (None, Unguided(), Auto(path=flow[0], weight=0)):
        found = guidance.check(how, flow[1])
        assert found.recipe is None and found.origin == {}
        assert found.velocity(GOOD, "32-true", torch.device("cpu")) is GOOD


def test_a_recipe_holds_what_changes_the_velocity(flow, tmp_path):
    digest = files.weights_hash(flow[0])
    found = guidance.check(Auto(path=flow[0], weight=1, low=0.2), flow[1])
    assert found.recipe == {"kind": "auto", "weight": 1.0, "low": 0.2, "high": 1.0, "guide": digest}
    cfg = guidance.check(ClassifierFree(weight=0.4), CONDITIONAL)
    assert cfg.recipe == {"kind": "cfg", "weight": 0.4, "low": 0.0, "high": 1.0, "guide": None}
    assert guidance.in_words(found.recipe) == f"auto 1 for t in [0.2, 1] by {digest}"
    assert guidance.in_words(cfg.recipe) == "cfg 0.4" and guidance.in_words(None) == "none"
    assert guidance.again(found.recipe, found.origin, flow[1]).recipe == found.recipe
    assert guidance.again(cfg.recipe, cfg.origin, CONDITIONAL) == cfg and guidance.again(None, {}, {}).how is None
    teacher_file(flow[0], exact=True)
    with pytest.raises(UserError, match=f"has another hash than the guide of these pairs, {digest}"):
        guidance.again(found.recipe, found.origin, flow[1])


def test_autoguidance_by_a_file(flow, tmp_path):
    weak = teacher_file(tmp_path / "weak.safetensors", "net.network.width=8", exact=False)
    network, x, t = files.load(flow[0]), X.float(), T.float()
    guided = guidance.check(Auto(path=weak, weight=0.5), flow[1]).velocity(network, "32-true", torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(guided(x, t), 1.5 * network(x, t) - 0.5 * files.load(weak)(x, t), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided(x, t), network(x, t), atol=0.01)


def test_a_guide_is_opened_as_foreign_files_are(flow, tmp_path):
    evil = tmp_path / "evil.safetensors"
    about = flow[1] | {"net": {"_target_": "torch.nn.Identity"}}
    files.save(torch.nn.Identity(), evil, about)
    with pytest.raises(UserError, match=r"names torch\.nn\.Identity, but it may build only"):
        guidance.check(Auto(path=evil, weight=1), flow[1]).velocity(GOOD, "32-true", torch.device("cpu"))


NAN = float("nan")
STRENGTHS = [
    ({"weight": NAN}, "guidance.weight=nan: must be a finite number"),
    ({"weight": "much"}, "guidance.weight=much: must be a finite number"),
    ({"weight": True}, "guidance.weight=True: must be a finite number"),
    ({"weight": 1, "low": 0.5, "high": 0.5}, "guidance.high=0.5: must lie above guidance.low=0.5"),
    ({"weight": 1, "low": 0.8, "high": 0.5}, "guidance.high=0.5: must lie above guidance.low=0.8"),
    ({"weight": 1, "high": 2.9}, "guidance.high=2.9: must lie above guidance.low=0.0 and be at most 1"),
    ({"weight": 1, "low": -0.1}, r"guidance.low=-0.1: must lie in \[0, 1\)"),
    ({"weight": 1, "high": NAN}, "guidance.high=nan: must be a finite number"),
]


@pytest.mark.parametrize(("strength", "line"), STRENGTHS)
def test_wrong_strengths(strength, line):
    with pytest.raises(UserError, match=f"^{line}"):
        ClassifierFree(**strength)


UNSUITED = [
    (ClassifierFree(weight=1), {"num_classes": 0}, "inf.guidance=cfg: this flow is unconditional"),
    (ClassifierFree(weight=0), {"label_dropout": 0.0}, "inf.guidance=cfg: .*without training.label_dropout"),
    (Auto(path=None, weight=1), {}, "inf.guidance.path=None: needs a run folder or a weight file"),
    (Auto(path="nowhere.safetensors", weight=1), {}, "nowhere.safetensors: no such file"),
    (Auto(path="flow", weight=1), {"shape": [3, 8, 8]}, r"inf.guidance.path=.*samples of shape \(2,\).* makes \(3, 8, 8\)"),
    (Auto(path="two", weight=1), {}, "inf.guidance.path=.*: takes 2 classes, but the flow that it guides 10"),
    (Auto(path="two", weight=1), {"num_classes": 0}, "inf.guidance.path=.*: takes 2 classes, but the flow that it guides none"),
]


@pytest.mark.parametrize(("how", "about", "line"), UNSUITED)
def test_what_does_not_suit_the_flow(how, about, line, flow, tmp_path):
    if isinstance(how, Auto) and how.path in ("flow", "two"):
        more = ["net.network.num_classes=2"] if how.path == "two" else []
        how = Auto(path=teacher_file(tmp_path / "guide.safetensors", *more), weight=1)
    with pytest.raises(UserError, match=f"^{line}") as caught:
        guidance.check(how, CONDITIONAL | about, "inf.guidance")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("member", ["none", "cfg", "auto"])
def test_members(member):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", [f"inf/guidance={member}", "inf/guidance@pairs.guidance=cfg", "pairs.guidance.weight=2"])
    made = instantiate(cfg.inf.guidance)
    assert isinstance(made, {"none": Unguided, "cfg": ClassifierFree, "auto": Auto}[member])
    assert not isinstance(made, Guidance) or (made.low, made.high) == (0, 1)
    assert instantiate(cfg.pairs.guidance) == ClassifierFree(weight=2)
    assert "guidance" in (Path(conf_dir()) / "inf" / "guidance" / f"{member}.yaml").read_text().splitlines()[0].lower()
