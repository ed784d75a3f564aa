"""The overfitting check: its losses against their formula, and two small trainings, one that memorises and one that cannot."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from reflow_lab.data.augment import Augmentation
from reflow_lab.data.sets import ImageSet, PointSet
from reflow_lab.dyn.metrics import SquaredError
from reflow_lab.dyn.objective import Objective
from reflow_lab.dyn.times import Uniform
from reflow_lab.dyn.weights import PowerOfTime
from reflow_lab.gaussian import Gaussian
from reflow_lab.lrn.couplings import IndependentPairs, MinibatchOTPairs, Mixture
from reflow_lab.training.lifecycle import JSONLines, Steps
from reflow_lab.training.module import FlowModule
from reflow_lab.training.overfitting import Overfitting, clearly_positive, fixed_pairs, velocity_losses
from reflow_lab.training.train import quiet_trainer

LAW = Gaussian(0.0, 0.5)


class Exact(nn.Module):
    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        assert not torch.is_grad_enabled()
        return LAW(x_t, t)


class Perceptron(nn.Module):
    """Wide enough to remember a few images of four by four."""

    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 16))

    def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
        return self.layers(torch.cat((x_t.flatten(1), t[:, None]), 1)).reshape(x_t.shape)


def module(velocity, coupling=None, batch_size=64):
    return FlowModule(
        velocity, Objective(Uniform(), SquaredError(), PowerOfTime(2)), coupling, batch_size=batch_size, lr=2e-3, seed=0
    )


def normal_points(n, seed):
    points = 0.5 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return PointSet(points, None, "points", "points")


def noise_images(n, seed):
    values = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ImageSet(values, torch.arange(n) % 3, "noise")


@pytest.mark.parametrize("batch_size", [64, 99, 256])
def test_losses_are_those_of_the_velocity_at_evenly_spread_times(batch_size):
    """Whatever the batch size; each of 16 images is seen at 16 times all along (0, 1)."""
    batch = fixed_pairs(IndependentPairs(normal_points(40, 0), 1), 16)
    losses = velocity_losses(module(Exact(), batch_size=batch_size), batch, 16)
    for image in range(16):
        t = (torch.arange(image, 256, 16) + 0.5) / 256
        x0, x1 = normal_points(40, 0).points[image], batch.x1[image::16]
        x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
        assert losses[image].item() == pytest.approx((LAW(x_t, t) - (x1 - x0)).square().mean().item(), rel=1e-5)


def test_the_loss_of_the_best_velocity_is_the_theorys():
    """For data N(0, s^2) it is the integral over t of s^2 / (t^2 + (1 - t)^2 s^2)."""
    pairs, t = IndependentPairs(normal_points(256, 0), 1), (torch.arange(256) + 0.5) / 256
    loss = velocity_losses(module(Exact()), fixed_pairs(pairs, 256), 256).mean().item()
    assert loss == pytest.approx((0.25 / (t**2 + (1 - t) ** 2 * 0.25)).mean().item(), rel=0.1)


def test_classes_go_to_the_velocity():
    class Class(nn.Module):
        def forward(self, x_t, t, s=None, *, label=None, lam_guid=None):
            seen.append(label)
            return x_t

    seen = []
    velocity_losses(module(Class(), batch_size=100), fixed_pairs(IndependentPairs(noise_images(50, 0), 1), 50), 50)
    assert torch.equal(torch.cat(seen), torch.arange(50).repeat(5) % 3) and len(seen) == 3


def test_all_kinds_of_images_have_the_same_noise_and_nothing_is_done_to_them():
    changed = Augmentation(flips=True, probability=1)
    first, second = (fixed_pairs(IndependentPairs(noise_images(20, seed), 1, changed), 9) for seed in (0, 1))
    assert torch.equal(first.x1, second.x1) and not torch.equal(first.x0, second.x0)
    assert torch.equal(first.x0[9:18], noise_images(20, 0).take(np.arange(9))[0]) and first.augment is None
    assert len(first.x0) == 28 * 9
    assert fixed_pairs(MinibatchOTPairs(normal_points(20, 0), 1), 9).x1.shape == (28 * 9, 3)


@pytest.mark.parametrize(("mean", "clear"), [(0.0, False), (0.005, False), (0.05, True), (-0.05, False)])
def test_what_is_clear(mean, clear):
    values = torch.randn(10_000).double()
    assert clearly_positive((values - values.mean()) / values.std() + mean) is clear


def fitted(images, heldout, copies, kimg, tmp_path):
    """The callback after a training on so many copies of the images, what it said, and what was logged."""
    many = ImageSet(images.images.repeat(copies, 1, 1, 1), None, "copies")
    coupling, _ = Mixture(independent=1).open({"independent": IndependentPairs(many, 3)}, 64, 3, 64)
    check = Overfitting(IndependentPairs(images, 3), IndependentPairs(heldout, 3), every_kimg=8)
    lines, steps = JSONLines(tmp_path / "metrics.jsonl"), round(kimg * 1000 / 64)
    how = {"logger": [lines], "callbacks": [check], "default_root_dir": tmp_path}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(accelerator="cpu", max_steps=steps, **how).fit(module(Perceptron(), coupling), Steps())
    told = [str(warning.message) for warning in caught if "memorises" in str(warning.message)]
    return check, told, [json.loads(line) for line in lines.path.read_text().splitlines()]


def test_memorising_sixteen_images_is_told_once(tmp_path):
    check, told, logged = fitted(noise_images(16, 0), noise_images(64, 1), 16, 32, tmp_path)
    assert check.num == 16 and len(told) == 1 and "\n" not in told[0]
    best = min(logged, key=lambda line: line["overfitting/heldout"])
    kimg = best["step"] * 64 / 1000
    assert f"at {kimg:g} kimg; more training.augment or dropout" in told[0]
    assert told[0].endswith(f"training.total_kimg={kimg:g}") and check.best["kimg"] == pytest.approx(kimg)
    assert logged[-1]["overfitting/gap"] == pytest.approx(logged[-1]["overfitting/heldout"] / logged[-1]["overfitting/train"] - 1)
    assert logged[-1]["overfitting/gap"] > 1


def test_plenty_of_images_is_no_warning(tmp_path):
    check, told, logged = fitted(noise_images(20_000, 0), noise_images(2000, 1), 1, 40, tmp_path)
    assert check.num == 256 and not told and len(logged) == 5
    assert all(abs(line["overfitting/gap"]) < 0.1 for line in logged)
    assert logged[-1]["overfitting/heldout"] < logged[0]["overfitting/heldout"]


def test_what_it_found_goes_on_after_a_resume():
    """A new callback with the old one's state does not warn again, and keeps the best."""
    images = IndependentPairs(noise_images(9, 0), 3)
    old, new = Overfitting(images, images, 1), Overfitting(images, images, 1)
    base = torch.linspace(1, 2, 9).double()
    old._compare(base, base, 1.0)
    with pytest.warns(UserWarning, match=r"^at 2 kimg .* held-out ones, 1\.6, was best \(1\.5\) at 1 kimg"):
        old._compare(base - 0.1, base + 0.1, 2.0)
    new.load_state_dict(old.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new._compare(base - 0.2, base + 0.2, 3.0)
        assert new.best["kimg"] == 1.0
        new._compare(base - 0.2, base - 0.2, 4.0)
    assert new.best["kimg"] == 4.0


@pytest.mark.parametrize(("train", "heldout"), [(0.1, 0.1), (-0.1, -0.1), (0.0, 0.1)])
def test_only_a_rise_beside_a_fall_is_overfitting(train, heldout):
    """When both losses rise, the weights got worse; when both fall, they got better."""
    images, base = IndependentPairs(noise_images(9, 0), 3), torch.linspace(1, 2, 9).double()
    check = Overfitting(images, images, 1)
    check._compare(base, base, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check._compare(base + train, base + heldout, 2.0)
    assert not check.warned and np.isclose(check.best["kimg"], 1.0 if heldout > 0 else 2.0)
