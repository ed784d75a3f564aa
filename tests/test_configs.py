"""Every YAML in conf/ composes and instantiates, over the files found: a new one is tested at once."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from reflow_lab import cli
from reflow_lab.paths import conf_dir

CONF = conf_dir()
VERBS = [name for name, verb in cli.VERBS.items() if verb.is_hydra]
FOUND = sorted((str(path.parent.relative_to(CONF)), path.stem) for path in CONF.rglob("*.yaml") if path.parent != CONF)
EXTRAS = {("launcher", "ray"): "ray"}  # which the developers' installation lacks
MEMBERS = [case for case in FOUND if find_spec(EXTRAS.get(case, "hydra"))]
PRESETS = [case for case in MEMBERS if case[0] in ("dyn", "lrn", "inf")]
IDS = [f"{group}={member}" for group, member in MEMBERS]


def text(group, member):
    return (CONF / group / f"{member}.yaml").read_text()


GLOBAL = [case for case in MEMBERS if "# @package _global_" in text(*case)]  # experiments and the like: keys of any group


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(verb, *overrides):
    return compose(config_name=verb, overrides=list(overrides), return_hydra_config=True)


def job_config(verb, *overrides):
    cfg = composed(verb, *overrides)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg


def overrides_for(group, member):
    """The member, and the one it needs beside it: points go with the MLP, images with a U-Net, parts of a flow map with one."""
    beside = ["flow_map=ayf"] if group.startswith("flow_map/") else []
    if group == "data" and "\ndim:" in text(group, member):
        beside = ["net=mlp"]
    if group == "net" and "${data.dim}" in text(group, member):
        beside = ["data=gaussian"]
    return [f"{group}={member}", *beside]


def targets(node):
    """The outermost nodes with a `_target_` (null: nothing to make)."""
    if not isinstance(node, DictConfig):
        return []
    if "_target_" in node:
        return [node] if node["_target_"] else []
    return [target for key in node if not OmegaConf.is_missing(node, key) for target in targets(node[key])]


def build(node):
    """Instantiate; a network without its memory, since the large ones have hundreds of millions of weights."""
    with torch.device("meta") if "networks" in node["_target_"] else nullcontext():
        return instantiate(node)


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_search_found_the_groups():
    improvements = {"dyn/weight", "dyn/time", "dyn/metric", "lrn/dropout", "lrn/coupling", "inf/grid", "inf/solver"}
    assert {group for group, _ in MEMBERS} >= improvements | {"dyn", "lrn", "inf", "net", "data", "experiment"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_every_group(verb):
    """All verbs share one schema: `group=member` is understood everywhere, without a plus sign."""
    assert set(composed(verb, "flow_map=ayf").hydra.runtime.choices) >= {group for group, _ in MEMBERS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_resolves(verb):
    OmegaConf.to_container(job_config(verb), resolve=True)


@pytest.mark.parametrize("group, member", MEMBERS, ids=IDS)
def test_member_composes_and_instantiates(group, member):
    cfg = job_config("train", *overrides_for(group, member))
    OmegaConf.to_container(cfg, resolve=True)
    is_global = (group, member) in GLOBAL
    for node in targets(cfg if is_global else OmegaConf.select(cfg, group.replace("/", "."))):
        assert build(node) is not None


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
@pytest.mark.parametrize("group, member", PRESETS + GLOBAL)
def test_presets_compose_into_every_verb(verb, group, member):
    """Members that override other groups; the rest are the same in each verb (`test_every_verb_has_every_group`)."""
    OmegaConf.to_container(job_config(verb, f"{group}={member}"), resolve=True)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("group, member", GLOBAL)
def test_an_experiments_keys_win(verb, group, member):
    """They would be lost in silence if a primary configuration's `_self_` stood behind them, and the key beside a `_self_`."""
    cfg = composed(verb, f"{group}={member}")
    body = OmegaConf.create(text(group, member))
    body.pop("defaults", None)
    found = dict(leaves(OmegaConf.to_container(cfg, resolve=False)))
    for key, value in leaves(OmegaConf.to_container(body)):
        assert found[key] == value


@pytest.mark.parametrize("verb", VERBS)
def test_an_experiment_may_set_every_key(verb, tmp_path):
    """Shared keys and the verb's own ones: an experiment stands last in the list of defaults."""
    cfg = composed(verb)
    order = [name for name in cfg.hydra.runtime.choices if not name.startswith("hydra/")]
    assert "experiment" in order
    keys = {
        key for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False)) if not key.startswith("hydra.") and "." not in key
    }
    (tmp_path / "experiment").mkdir()
    lines = "\n".join(f"{key}: changed" for key in sorted(keys))
    (tmp_path / "experiment" / "all.yaml").write_text(f"# @package _global_\n{lines}\n")
    changed = compose(config_name=verb, overrides=[f"hydra.searchpath=[file://{tmp_path}]", "experiment=all"])
    assert {key for key in keys if changed[key] != "changed"} == set()
