"""A flow map from its configuration: what its recipe holds, what it starts from, what is refused before any work."""

import json
from types import SimpleNamespace

import pytest
import torch

from reflow_lab import parts
from reflow_lab.dyn.times import LogitNormal
from reflow_lab.errors import UserError
from reflow_lab.flow_maps.derivatives import Exact
from reflow_lab.flow_maps.distillation import Distillation
from reflow_lab.flow_maps.objectives import Consistency, Matching
from reflow_lab.flow_maps.times import ToData
from reflow_lab.lrn.couplings import Batch
from reflow_lab.networks import files
from reflow_lab.training.jumps import by_jump
from reflow_lab.training.train import plan, require_augmentable, train
from tiny import composed
from toy import config, teacher_file

WORDS = [
    "flow_map=ayf",
    "training=flow_map",
    "lrn=flow_map",
    "inf=flow_map",
    "flow_map.warmup_steps=4",
    "flow_map.align_steps=20",
    "training.total_kimg=0.256",
    "training.batch_size=32",
    "training.num_heldout=16",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", exact=False)


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("weak") / "weak.safetensors", exact=True)


@pytest.fixture
def configured(teacher, tmp_path):
    return lambda *more: config("train", tmp_path / "outputs", f"teacher.path={teacher}", *WORDS, *more)


def test_a_flow_map_is_trained_and_saved(configured):
    run = train(configured("trainer.diagnostics_every_kimg=0.128"))
    about = files.describe(files.find(run))
    assert about["net"]["network"]["jumps"] is True and about["lam_guid"] == [1.0, 1.0]
    errors = json.loads((run / "align.json").read_text())["relative_error"]
    assert len(errors) == 11 and errors[-1] < errors[0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 8 and "heldout_error" in line]
    assert last["by_jump/0.5/error"] > 0 and last["by_jump/0.95/semigroup"] > 0
    velocity = files.load(files.find(run))
    x, t = torch.randn(4, 2), torch.rand(4)
    assert velocity(x, t, t / 2).shape == velocity(x, t).shape == (4, 2)


def test_the_recipe_holds_the_flow_map_in_the_place_of_dyn(configured):
    recipe = plan(configured()).recipe
    assert "dyn" not in recipe["config"] and recipe["config"]["flow_map"]["guidance"] == [1.0, 1.0]
    assert recipe["inputs"]["teacher"] == recipe["inputs"]["start"] and recipe["inputs"]["guidance"] is None
    assert plan(configured("dyn=baseline")).key == plan(configured("dyn=improved")).key


def test_everything_that_changes_it_changes_its_key(configured, weak):
    guided = ["flow_map/guidance=auto", f"flow_map.guidance.how.path={weak}"]
    kinds = [
        [],
        ["flow_map.c=null"],
        ["flow_map.warmup_cap=1"],
        ["flow_map=lmd"],
        ["flow_map/derivative=finite_difference"],
        ["flow_map/times=sorted"],
        ["flow_map.align_steps=10"],
        guided,
        [*guided, "flow_map.guidance.lam_guid=[1,2]"],
    ]
    keys = {plan(configured(*words)).key for words in kinds}
    assert len(keys) == len(kinds)


def test_a_velocity_keeps_the_key_it_had(configured):
    small = ["training.batch_size=32", "training.num_heldout=16"]
    recipe = plan(config("train", configured().outputs, f"teacher.path={configured().teacher.path}", *small)).recipe
    assert "flow_map" not in recipe["config"] and not {"teacher", "guidance"} & set(recipe["inputs"])


def test_a_flow_map_goes_on_from_a_flow_map(configured):
    first = train(configured())
    second = train(configured(f"training.start={first}", "training.lr=1e-5"))
    assert not (second / "align.json").exists()
    assert json.loads((second / "recipe.json").read_text())["inputs"]["start"] == files.weights_hash(files.find(first))


def test_a_consistency_model_is_watched_where_it_jumps(configured, capsys):
    run = train(configured("flow_map=consistency", "trainer.diagnostics_every_kimg=0.128"))
    assert files.describe(files.find(run))["only_to_data"] is True
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 8 and "heldout_error" in line]
    assert last["by_jump/0.5/error"] > 0 and not any("semigroup" in name for name in last)
    assert "inf.solver.gamma=0: this consistency model jumps to data only" in capsys.readouterr().err


def test_the_errors_of_a_consistency_model_end_at_data():
    asked = []

    class Watched(Consistency):
        def __call__(self, student, at, F, field, warmup):
            asked.append((at.t.unique().tolist(), at.s.unique().tolist()))
            return F - at.v

    objective = Distillation(Matching(Watched(Exact()), warmup_steps=0), ToData(LogitNormal(0.0, 1.0)), None)
    module = SimpleNamespace(objective=objective, velocity=lambda x, t, s, **_: x, global_step=0)
    found = by_jump(module, Batch(torch.randn(6, 2), torch.randn(6, 2), None), (0.25, 0.75))
    assert asked == [([0.25], [0.0]), ([0.75], [0.0])]
    assert set(found) == {"heldout_error", "by_jump/0.25/error", "by_jump/0.75/error"}


def test_a_warm_up_that_outlasts_the_training_is_said(configured, capsys):
    train(configured("flow_map.warmup_steps=9"))
    assert "flow_map.warmup_steps=9: training has 8 steps" in capsys.readouterr().err


def test_a_velocity_does_not_jump(configured):
    words = ["flow_map=none", "training=reflow", "lrn=base_flow", "inf=flow_map", "training.batch_size=32"]
    with pytest.raises(UserError, match="inf/solver=flow_map: needs a flow map"):
        plan(config("train", configured().outputs, f"teacher.path={configured().teacher.path}", *words))


def test_a_velocity_of_a_flow_maps_network_is_none(configured):
    """net=teacher takes its network, which a velocity does not teach to jump."""
    run = train(configured())
    cfg = config("train", configured().outputs, f"teacher.path={run}", "training.start=scratch", "lrn=base_flow")
    cfg.net = {"from": "teacher"}
    parts.settle_net(cfg)
    assert cfg.net.network.jumps is False
    with pytest.raises(UserError, match=r"training.start=.*: is a flow map, whose weights no velocity can take over"):
        plan(config("train", configured().outputs, f"teacher.path={run}", f"training.start={run}", "lrn=base_flow"))


def test_the_teacher_is_not_told_of_augmentation():
    words = ["experiment=quickstart_flow_map", "training.augment=0.1", "net.network.augment_dim=9"]
    with pytest.raises(UserError, match=r"training.augment=0.1: must be 0 for a flow map"):
        require_augmentable(composed("train", *words), ["independent"])


WRONG = {
    "autoguidance without a weak model": (["flow_map/guidance=auto"], "flow_map.guidance.how.path=None: needs a run folder"),
    "CFG of an unconditional teacher": (["flow_map/guidance=cfg"], "flow_map.guidance.how=cfg: this flow is unconditional"),
    "strengths without guidance": (["flow_map.guidance.lam_guid=[1,2]"], r"flow_map.guidance.lam_guid=\[1, 2\]: is for a guided"),
    "strengths that descend": (
        ["flow_map/guidance=cfg", "flow_map.guidance.lam_guid=[2,1]"],
        r"lam_guid=\[2.*1.*\]: must be two numbers, 0 <= low",
    ),
    "a consistency model with other aims": (["flow_map/objective=consistency"], "flow_map.times=DistanceTimes: draws s > 0"),
    "a velocity of nobody": (["flow_map.velocity=me"], "flow_map.velocity=me: allowed: teacher, data"),
    "LMD without a teacher": (["flow_map=lmd", "flow_map.velocity=data"], "flow_map.velocity=data: LMD asks a teacher"),
    "strengths of one": (
        ["flow_map/guidance=cfg", "flow_map.guidance.lam_guid=[1]"],
        r"flow_map.guidance.lam_guid=\[1\]: must be two",
    ),
    "a guided velocity of the data": (
        ["flow_map/guidance=cfg", "flow_map.velocity=data"],
        "flow_map.velocity=data: has no teacher to guide",
    ),
    "a negative normalisation": (["flow_map.c=-1"], "flow_map.c=-1: a number > 0, or null"),
    "a normalisation in words": (["flow_map.c=abc"], "flow_map.c=abc: must be a number"),
    "no warm-up at all": (["flow_map.warmup_steps=null"], "flow_map.warmup_steps=None: must be a whole number"),
    "half a step of warm-up": (["flow_map.warmup_steps=2.5"], "flow_map.warmup_steps=2.5: must be a whole number"),
    "a warm-up to nowhere": (["flow_map.warmup_cap=null"], "flow_map.warmup_cap=None: must be a number"),
    "a share in words": (["flow_map.times.share_equal=some"], "flow_map.times.share_equal=some: must be a number"),
    "halves of jumps that nothing holds": (
        ["flow_map/objective=shortcut", "flow_map.times.share_equal=0"],
        "flow_map.times=DistanceTimes: never draws s = t, where alone Shortcut learns",
    ),
    "a flow map that is guided besides": (
        ["inf/guidance=auto", "inf.guidance.path=x"],
        "inf/guidance=auto: guides velocities; a flow map learned its guidance",
    ),
    "a warm-up beyond 1": (["flow_map.warmup_cap=1.5"], "flow_map.warmup_cap=1.5"),
    "half a step of alignment": (["flow_map.align_steps=0.5"], "flow_map.align_steps=0.5: must be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_is_refused_before_any_work(configured, name, tmp_path):
    words, said = WRONG[name]
    with pytest.raises(UserError, match=said):
        plan(configured(*words))
    assert not (tmp_path / "outputs").exists()
