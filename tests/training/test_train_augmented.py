"""`training.flips` and `training.augment` from the configuration to the network, and where they are refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import tiny
from reflow_lab.errors import UserError
from reflow_lab.networks.unet import UNet
from reflow_lab.training.train import overfitting, plan, train

AUGMENTED = ["training.augment=0.3", "net.network.augment_dim=9"]


def base(outputs, *more, experiment="quickstart_base", own=tiny.IMAGES):
    return tiny.composed("train", f"experiment={experiment}", *tiny.COMMON, *own, f"outputs={outputs}", *more)


@pytest.fixture
def seen(monkeypatch):
    """The augmentation labels of every call of the network."""
    given, forward = [], UNet.forward

    def recorded(self, x, t, label=None, augment=None):
        given.append(augment)
        return forward(self, x, t, label, augment)

    monkeypatch.setattr(UNet, "forward", recorded)
    return given


def test_the_labels_reach_the_network_in_training_alone(tmp_path, seen):
    """Diagnostics, samples and the overfitting check have none; the keys are part of the recipe."""
    cfg = base(tmp_path, *AUGMENTED, "training.flips=true", "training.total_kimg=0.128")
    folder = train(cfg)
    given = [labels for labels in seen if labels is not None]
    assert [labels.shape for labels in given] == [(32, 9)] * 4 and len(seen) > 4
    assert all(0.2 < (labels[:, 0] == 1).float().mean() < 0.8 and (labels[:, 2] != 0).any() for labels in given)
    assert load_file(folder / "weights" / "raw.safetensors")["network.map_augment.weight"].shape[1] == 9
    recipe = plan(cfg).recipe["config"]["training"]
    assert recipe["flips"] is True and recipe["augment"] == 0.3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("overfitting/heldout", 0) > 0 for line in lines)


def test_without_augmentation_the_network_is_given_none(tmp_path, seen):
    train(base(tmp_path, "training.total_kimg=0.032"))
    assert seen and all(labels is None for labels in seen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["training.augment=0.1"],
            "training.augment=0.1: needs a network that takes 9 augmentation labels; net.network.augment_dim=0",
        ),
        (["training.augment=1.5"], "training.augment=1.5: must be a probability in [0, 1]"),
        (["training.augment=true"], "training.augment=True: must be a probability in [0, 1]"),
        (["training.flips=0.5"], "training.flips=0.5: must be true or false"),
    ],
)
def test_bad_values_are_one_line(tmp_path, values, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        plan(base(tmp_path, *values))


@pytest.mark.parametrize("value", ["training.flips=true", "training.augment=0.1"])
def test_points_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=rf"^{value.replace('true', 'True')}: is for images: these data are points or latents$"):
        plan(base(tmp_path, value, experiment="toy_base", own=tiny.POINTS))


@pytest.mark.parametrize("value", ["training.flips=true", "training.augment=0.1"])
def test_stored_pairs_are_refused(images, value):
    with pytest.raises(
        UserError, match=rf"^{value.replace('true', 'True')}: acts on images with fresh noise .*pairs\.flips is for"
    ):
        plan(images.config("train", value))


def test_a_reflow_is_not_checked_for_overfitting(images, toy):
    assert overfitting(images.config("train"), ["backward", "independent"]) == []
    (check,) = overfitting(toy.config("train"), ["minibatch_ot"])
    assert check.num == 256 and torch.isfinite(check.train.read(torch.arange(4).numpy(), 0).x1).all()
