import numpy as np
import pytest
import torch

from reflow_lab.data.sources import SPLITS
from reflow_lab.data.toys import Checkerboard, Gaussian, TwoMoons
from reflow_lab.errors import UserError

TOYS = [Gaussian, TwoMoons, Checkerboard]


@pytest.mark.parametrize("toy", TOYS)
def test_split_shape_and_determinism(toy):
    one, two = (toy(num_points=100).split("train") for _ in range(2))
    assert one.points.shape == (100, 2) and one.points.dtype == torch.float32
    assert torch.equal(one.points, two.points) and one.content_hash == two.content_hash
    assert one is not two


@pytest.mark.parametrize("toy", TOYS)
def test_splits_share_no_point(toy):
    source = toy(num_points=300)
    points = torch.cat([source.split(name).points for name in SPLITS])
    assert len(points.unique(dim=0)) == 900
    assert len({source.split(name).content_hash for name in SPLITS}) == 3


@pytest.mark.parametrize("toy", TOYS)
def test_a_larger_set_begins_with_the_smaller(toy):
    small, large = toy(num_points=50).split("train"), toy(num_points=80).split("train")
    assert torch.equal(small.points, large.points[:50]) and small.content_hash != large.content_hash


def test_the_hash_knows_the_parameters_however_written():
    hashes = [Gaussian(mean=mean).split("train").content_hash for mean in (1, 1.0, [1.0, 1], 2)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_gaussian_has_its_moments():
    points = Gaussian(mean=[1.0, -2.0, 0.0], std=[0.5, 0.1, 2.0], dim=3).split("train").points.double()
    std = torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64)
    error = (points.mean(0) - torch.tensor([1.0, -2.0, 0.0])) / std
    assert error.abs().max() < 4 / 20_000**0.5
    assert (points.std(0) / std - 1).abs().max() < 4 / 40_000**0.5
    assert (torch.corrcoef(points.T) - torch.eye(3)).abs().max() < 4 / 20_000**0.5


def test_gaussian_closed_form_carries_noise_to_the_data():
    source = Gaussian(mean=[1.0, -2.0], std=[0.5, 0.1])
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = source.closed_form().flow_map(z, torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(x0, torch.tensor([1.0, -2.0]) + torch.tensor([0.5, 0.1], dtype=torch.float64) * z)


def test_moons_lie_on_two_half_circles():
    held = TwoMoons(noise=0.0).split("train")
    upper = held.points * (1 - 2 * held.labels[:, None]) + torch.tensor([0.5, 0.25])
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(len(held)))
    assert upper[:, 1].min() > 0
    angle = torch.atan2(upper[:, 1], upper[:, 0]) / torch.pi
    assert abs(angle.mean() - 0.5) < 0.01 and abs(angle.std() - 12**-0.5) < 0.01
    assert abs(held.labels.float().mean() - 0.5) < 0.015 and held.points.mean(0).abs().max() < 0.025


def test_moons_noise_has_its_size():
    clean, noisy = (TwoMoons(noise=noise).split("train") for noise in (0.0, 0.1))
    assert torch.equal(clean.labels, noisy.labels)
    assert (noisy.points - clean.points).std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("cells", [2, 4, 6])
def test_checkerboard_fills_the_dark_squares_evenly(cells):
    points = Checkerboard(cells=cells).split("train").points
    square = ((points + 1) * cells / 2).floor().long()
    assert square.min() == 0 and square.max() == cells - 1 and (square.sum(1) % 2 == 0).all()
    counts = np.bincount(square[:, 0] * cells + square[:, 1], minlength=cells**2)
    mean = 20_000 / (cells**2 / 2)
    assert (np.abs(counts[counts > 0] - mean) < 5 * mean**0.5).all() and (counts > 0).sum() == cells**2 / 2
    within = (points + 1) * cells / 2 - square
    assert (within.mean(0) - 0.5).abs().max() < 0.01 and (within.std(0) - 12**-0.5).abs().max() < 0.01


@pytest.mark.parametrize(
    ("toy", "key", "value"),
    [
        (Gaussian, "mean", [1.0]),
        (Gaussian, "mean", "x"),
        (Gaussian, "std", 0.0),
        (Gaussian, "std", [1.0, -1.0]),
        (Gaussian, "dim", 0),
        (Gaussian, "num_classes", 2),
        (TwoMoons, "noise", -0.1),
        (TwoMoons, "noise", "x"),
        (TwoMoons, "dim", 3),
        (Checkerboard, "cells", 3),
        (Checkerboard, "num_points", 0),
    ],
)
def test_impossible_arguments_are_refused(toy, key, value):
    with pytest.raises(UserError, match=rf"^data\.{key}=[^\n]+$"):
        toy(**{key: value})


@pytest.mark.parametrize("toy", TOYS)
def test_unknown_split(toy):
    with pytest.raises(UserError, match=r"^split=test"):
        toy().split("test")
