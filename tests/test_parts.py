"""Values that no constructor sees are named in one line, before any work."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.hydra_errors import explain
from reflow_lab.networks import files
from reflow_lab.paths import conf_dir
from reflow_lab.training import train
from toy import SMALL, config, teacher_file


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
        ("trainer.devices", 0, "must be a whole number of at least 1, or auto"),
        ("trainer.devices", "all", "must be a whole number of at least 1, or auto"),
        ("trainer.num_nodes", 0, "must be a whole number of at least 1"),
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


def with_teachers_net(tmp_path, *more):
    """The toy's configuration with net=teacher, and its teacher's weight file."""
    path = teacher_file(tmp_path / "teacher.safetensors", "net.network.width=24", "net.network.dropout=0.2", exact=False)
    words = [word for word in SMALL if not word.startswith("net")]
    return compose_train([*words, "net=teacher", f"outputs={tmp_path}", "teacher=run", f"teacher.path={path}", *more]), path


def compose_train(words):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", words)


def test_the_teachers_network_is_that_of_its_file_whatever_stands_beside_it(tmp_path):
    cfg, path = with_teachers_net(tmp_path, "+net.sigma_data=0.9")
    parts.settle_net(cfg)
    assert parts.plain(cfg.net) == files.describe(path)["net"] and cfg.net.network.dropout == 0.2
    parts.settle_net(cfg)  # what is settled stays
    assert cfg.net.network.width == 24


def test_a_run_with_the_teachers_network_is_the_one_with_its_settings_spelled_out(tmp_path):
    small = ("lrn=baseline", "training.batch_size=16", "training.num_heldout=8")
    cfg, path = with_teachers_net(tmp_path, *small)
    spelled = config(
        "train", tmp_path, *small, "net.network.width=24", "net.network.dropout=0.2", "teacher=run", f"teacher.path={path}"
    )
    assert train.plan(cfg).recipe == train.plan(spelled).recipe
    assert train.description(cfg)["net"] == files.describe(path)["net"]
    assert all(map(torch.equal, train.start(cfg).state_dict().values(), files.load(path).state_dict().values()))


@pytest.mark.parametrize("mistake", ["teacher=none", "net.from=student"])
def test_without_a_teacher_there_is_no_network_to_take(tmp_path, mistake):
    words = [word for word in SMALL if not word.startswith("net")]
    line = {"teacher=none": "net=teacher: needs a teacher", "net.from=student": r"net\.from=student: must be teacher"}[mistake]
    with pytest.raises(UserError, match=f"^{line}"):
        train.plan(compose_train([*words, "net=teacher", "training.start=scratch", f"outputs={tmp_path}", mistake]))


def test_a_file_that_names_other_code_builds_nothing(tmp_path):
    cfg, path = with_teachers_net(tmp_path)
    net = {"_target_": "os.system", "command": "true"}
    files.save(files.load(path), path, files.describe(path) | {"net": net})
    with pytest.raises(UserError, match=r"names os\.system, but it may build only reflow_lab\.networks"):
        parts.settle_net(cfg)
