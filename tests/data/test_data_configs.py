from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from reflow_lab.data.sources import SPLITS

CONF = Path(__file__).parents[2] / "conf" / "data"
MEMBERS = sorted(path.stem for path in CONF.glob("*.yaml"))


def load(member: str):
    return OmegaConf.create({"outputs": "outputs", "data": OmegaConf.load(CONF / f"{member}.yaml")}).data


@pytest.mark.parametrize("member", MEMBERS)
def test_member_instantiates_without_touching_the_disk(member, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, config = instantiate(load(member)), load(member)
    assert source.num_classes == config.num_classes
    assert (source.channels, source.resolution) == (config.get("channels", config.get("dim")), config.get("resolution", 1))


@pytest.mark.parametrize("member", ["fashion_mnist", "gaussian", "two_moons", "checkerboard"])
def test_members_that_need_no_file_give_every_split(member):
    source = instantiate(load(member))
    for name in SPLITS:
        held = source.split(name)
        assert held.shape in ((source.channels, source.resolution, source.resolution), (source.channels,))
        assert (held.labels is not None) == (source.num_classes > 0)


def test_a_list_from_a_configuration_is_understood():
    source = instantiate(load("gaussian"), mean=[1.0, 2.0])
    assert source.closed_form().mean.tolist() == [1.0, 2.0]
