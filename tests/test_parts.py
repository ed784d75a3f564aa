"""Values that no constructor sees are named in one line, before any work."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.hydra_errors import explain
from toy import config


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return config("train", tmp_path_factory.mktemp("outputs"), "inf/solver@pairs.solver=dpm")


def changed(cfg, key, value):
    copy = cfg.copy()
    OmegaConf.set_struct(copy, False)
    OmegaConf.update(copy, key, value, merge=False)
    return copy


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("trainer.accelerator", "tpu", "allowed: auto, cpu, gpu"),
        ("trainer.devices", 2, "must be 1: several devices are not in yet"),
        ("trainer.devices", "all", "must be 1"),
        ("trainer.checkpoint_every_s", -1, "must be a number of at least 0"),
        ("trainer.checkpoint_every_s", "often", "must be a number of at least 0"),
        ("training.batch_size", True, "must be a whole number of at least 1"),
        ("training.lr", True, "must be a positive number"),
        ("training.betas", 0.9, "must be two numbers in [0, 1)"),
        ("training.betas", [0.9], "must be two numbers in [0, 1)"),
        ("training.betas", [0.9, 1.0], "must be two numbers in [0, 1)"),
        ("training.betas", ["a", 0.9], "must be two numbers in [0, 1)"),
        ("training.ema_halflives_mimg", 0.5, "must be a list of positive numbers"),
        ("training.ema_halflives_mimg", [0], "must be a list of positive numbers"),
        ("training.ema_halflives_mimg", ["long"], "must be a list of positive numbers"),
        ("training.ema_sigma_rels", 0.1, "must be a list of numbers between 0 and 0.288"),
        ("training.ema_sigma_rels", [0.3], "must be a list of numbers between 0 and 0.288"),
        ("training.ema_sigma_rels", [0.0505], "must be a list of numbers between 0 and 0.288, to three decimals"),
        ("training.ema_sigma_rels", [0.1, 0.1], "must be a list of numbers between 0 and 0.288"),
        ("training.snapshot_every_kimg", 0, "must be a positive number"),
        ("training.snapshot_every_kimg", 10, "there is nothing to store: give training.ema_sigma_rels too"),
        ("training.start", 3, "must be a text"),
        ("training.start", None, "must be a text"),
        ("teacher.path", ["a"], "must be a text"),
        ("teacher.profile", 0.5, "must be a text"),
        ("run", 5, "must be a text"),
    ],
)
def test_a_bad_value_is_named(composed, key, value, allowed):
    with pytest.raises(UserError) as error:
        parts.check(changed(composed, key, value))
    assert str(error.value).startswith(f"{key}={value}: {allowed}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("training.ema_halflives_mimg", []), ("teacher.path", None), ("run", "outputs/train/x"), ("trainer.checkpoint_every_s", 0)],
)
def test_a_good_value_passes(composed, key, value):
    parts.check(changed(composed, key, value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(composed):
    with pytest.raises(UserError, match=r"^trainer\.accelerator=gpu: no CUDA device here; allowed: auto, cpu$"):
        parts.check(changed(composed, "trainer.accelerator", "gpu"))


@pytest.mark.parametrize("group", ["inf.solver", "pairs.solver"])
def test_a_constructors_argument_is_named_where_it_stands(composed, group):
    cfg = changed(changed(composed, "inf.solver", composed.pairs.solver), f"{group}.r", 2)
    with pytest.raises(Exception) as error:
        instantiate(OmegaConf.select(cfg, group))
    assert explain(error.value) == f"{group}.r=2: a number in (0, 1]"
