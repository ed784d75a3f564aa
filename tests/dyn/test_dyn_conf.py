from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from reflow_lab.dyn.metrics import HighPass, LPIPSHuber, PseudoHuber, SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Cosh, Exponential, LogitNormal, Points, Uniform
from reflow_lab.dyn.weights import EDMWeight, LearnedNormalisation, LossNormalisation, PowerOfTime

CONF = Path(__file__).parents[2] / "conf"
MEMBERS = {
    "weight": {
        "velocity": PowerOfTime,
        "inverse_t": PowerOfTime,
        "edm": EDMWeight,
        "loss_normalisation": LossNormalisation,
        "learned_normalisation": LearnedNormalisation,
    },
    "time": {
        "uniform": Uniform(),
        "cosh": Cosh(4.0),
        "logit_normal": LogitNormal(-1.2, 1.2),
        "exponential": Exponential(10.0),
        "distil_one": Points(1),
        "distil_k": Points(4),
    },
    "metric": {
        "squared_error": SquaredError(),
        "pseudo_huber": PseudoHuber(0.00054),
        "lpips_huber": LPIPSHuber("vgg", 0.00054),
        "high_pass": HighPass(1.0, 0.1),
    },
}
CHOICES = [(group, name) for group, members in MEMBERS.items() for name in members]


def objective(preset: str, *overrides: str, data: str = "{channels: 3}") -> Objective:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(f"dyn/{preset}", [f"+data={data}", "+t_max=1", *overrides])
    return Objective(**instantiate(config.dyn))


@pytest.mark.parametrize("group", MEMBERS)
def test_every_file_is_listed_here_and_says_what_it_is(group: str) -> None:
    files = sorted((CONF / "dyn" / group).glob("*.yaml"))
    assert [file.stem for file in files] == sorted(MEMBERS[group])
    assert all(file.read_text().startswith("# ") for file in files)


@pytest.mark.parametrize(("group", "name"), CHOICES)
@pytest.mark.parametrize("preset", ["baseline", "improved"])
def test_every_member_instantiates_in_every_preset(preset: str, group: str, name: str) -> None:
    with torch.device("meta"):
        part = getattr(objective(preset, f"dyn/{group}={name}"), group)
    expected = MEMBERS[group][name]
    assert isinstance(part, expected) if group == "weight" else part == expected


def test_presets_are_the_stage_in_one_word() -> None:
    baseline, improved = objective("baseline"), objective("improved")
    assert isinstance(baseline.weight, PowerOfTime) and baseline.weight.power == 1
    assert (baseline.time, baseline.metric) == (Cosh(4.0), SquaredError())
    assert isinstance(improved.weight, LossNormalisation) and improved.weight.eps == 1e-4
    assert (improved.time, improved.metric) == (Exponential(10.0), HighPass(1.0, 0.1))


def test_weights_have_their_papers_values() -> None:
    assert objective("baseline", "dyn/weight=velocity").weight.power == 2
    assert objective("baseline", "dyn/weight=edm").weight.sigma_data == 0.5
    learned = objective("baseline", "dyn/weight=learned_normalisation").weight
    assert (learned.eps, learned.lr, learned.blocks[0].conv.in_channels) == (1e-4, 1e-3, 3)
    points = objective("baseline", "dyn/weight=learned_normalisation", data="{dim: 2}").weight
    assert points.blocks[0].conv.in_channels == 2


def test_a_value_of_a_member_can_be_overridden() -> None:
    assert objective("improved", "dyn.metric.lam_hpf=100").metric == HighPass(100.0)
