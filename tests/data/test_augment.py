"""EDM's augmentation against its own code's numbers, and each change against the function that an image samples."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reflow_lab.data import augment
from reflow_lab.data.augment import CENTRE, SYM6, UNCHANGED, Augmentation, Changes, changed, drawn, flipped, lowpass, resampled
from reflow_lab.data.sets import to_float
from reflow_lab.noise import normal, uniform

FIXTURE = Path(__file__).parents[1] / "fixtures" / "augment.safetensors"
NAMES = [field.name for field in fields(Changes)]
SIDE = 32


def only(n=1, **given):
    """Changes of n images of which all are 0 but those given."""
    zero = torch.zeros(n, dtype=torch.float64)
    return Changes(**{name: zero + given.get(name, 0.0) for name in NAMES})


def noise(n, *shape):
    return 2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("name", ["small", "cifar"])
def test_as_edms_own_code_computes(name):
    """Images, the given changes and what EDM's code made of them: all changes, alone and together, not square too."""
    saved = load_file(FIXTURE)
    images, changes = to_float(saved[f"{name}.images"]), Changes(*saved[f"{name}.changes"])
    torch.testing.assert_close(changes.labels(), saved[f"{name}.labels"], rtol=0, atol=1e-6)
    torch.testing.assert_close(changed(images, changes), saved[f"{name}.changed"], rtol=0, atol=3e-5)


def test_the_filter_is_orthonormal_with_six_vanishing_moments():
    """What makes it a Daubechies filter of twelve taps: sum h_k h_(k+2m) = [m = 0], and sum (-1)^k k^p h_k = 0 for p < 6."""
    h, k = np.array(SYM6), np.arange(12.0)
    assert [h[: 12 - 2 * m] @ h[2 * m :] for m in range(6)] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    moments = [(h * (-1) ** k * ((k - 5.5) / 5.5) ** p).sum() for p in range(6)]
    assert moments == pytest.approx([0] * 6, abs=1e-10)
    assert np.sum(h) == pytest.approx(2**0.5)
    rows = lowpass(40)
    np.testing.assert_allclose((rows @ rows.T)[5:-5, 5:-5], np.eye(30), atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 12, 10), (2, 8, 8)])
def test_resampling_by_the_identity_changes_nothing(shape):
    images = noise(3, *shape)
    identity = torch.eye(3, dtype=torch.float64)[:2].expand(3, 2, 3)
    torch.testing.assert_close(resampled(images, identity), images, rtol=0, atol=5e-5)  # float32 places, of 188 pixels


def smooth(x, y):
    """A function whose own reflection at an image's outer pixels it is; x, y in pixels from the centre."""
    x, y = (torch.pi * (v / (SIDE - 1) + 0.5) for v in (x, y))
    return 0.4 * x.cos() + 0.3 * (2 * y).cos() + 0.2 * x.cos() * y.cos()


def grid():
    places = torch.arange(SIDE).double() - (SIDE - 1) / 2
    return torch.meshgrid(places, places, indexing="xy")


def image(x, y):
    return smooth(x, y).float()[None, None]


def close(changes, x, y, atol=5e-3):
    torch.testing.assert_close(changed(image(*grid()), changes), image(x, y), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [-2.5, -1.0, 0.7, 2.0])
def test_scaling_is_by_two_to_a_fifth(size):
    x, y = grid()
    close(only(scale=size), x / 2 ** (0.2 * size), y / 2 ** (0.2 * size))


@pytest.mark.parametrize("angle", [0.3, 1.0, -2.0, torch.pi])
def test_rotation_is_anticlockwise_for_who_looks_at_it(angle):
    """With y downwards: what the image shows at R x comes to x.

    The filter's centre of mass, tap 5.098, is not quite its CENTRE: half a turn moves the image by 0.098 pixels, as in EDM.
    """
    offset = (SYM6 * np.arange(12)).sum() / sum(SYM6) - CENTRE
    assert offset == pytest.approx(0.098, abs=1e-3)
    x, y = grid()
    cos, sin = np.cos(angle), np.sin(angle)
    close(only(rotation=angle), cos * x - sin * y, sin * x + cos * y, atol=5e-3 + offset * 0.1)  # the slope is 0.1 a pixel


@pytest.mark.parametrize(("right", "down"), [(1.0, 0.0), (0.0, -1.5), (0.3, 0.7)])
def test_translation_is_in_eighths_of_the_image(right, down):
    x, y = grid()
    close(only(right=right, down=down), x - right * SIDE / 8, y - down * SIDE / 8)


def test_anisotropic_scaling_is_along_an_axis_and_across_it_the_inverse():
    x, y = grid()
    s = 2**0.2
    close(only(stretch=1.0), x / s, y * s)
    close(only(stretch=1.0, axis=torch.pi / 2), x * s, y / s)
    along, across = (x - y) / 2**0.5 / s, (x + y) / 2**0.5 * s  # at 45 degrees the axis points right and up
    close(only(stretch=1.0, axis=torch.pi / 4), (along + across) / 2**0.5, (across - along) / 2**0.5)


def test_a_change_is_one_map_in_edms_order():
    """The image is scaled, rotated and then translated."""
    x, y = grid()
    cos, sin, x, y = np.cos(0.5), np.sin(0.5), x - SIDE / 8, y + SIDE / 16
    close(only(scale=1.0, rotation=0.5, right=1.0, down=-0.5), (cos * x - sin * y) / 2**0.2, (sin * x + cos * y) / 2**0.2)


def test_a_whole_pixel_and_a_right_angle_are_exact():
    """On noise, whose every frequency counts; away from the edges."""
    images = noise(1, 3, SIDE, SIDE)
    inner = (..., slice(8, -8), slice(8, -8))
    moved = changed(images, only(right=0.75, down=-0.25))  # 3 and -1 pixels
    torch.testing.assert_close(moved[inner], images.roll((-1, 3), (2, 3))[inner], rtol=0, atol=1e-4)
    half = changed(images, only(rotation=torch.pi))
    assert torch.corrcoef(torch.stack((half.flatten(), images.flip(2, 3).flatten())))[0, 1] > 0.9


def test_flips_are_exact_and_alone_are_no_resampling():
    images = noise(4, 3, 8, 6)
    changes = only(4, flip_x=torch.tensor([0.0, 1, 0, 1]), flip_y=torch.tensor([0.0, 0, 1, 1]))
    expected = torch.stack((images[0], images[1].flip(2), images[2].flip(1), images[3].flip(1, 2)))
    assert torch.equal(changed(images, changes), expected)
    assert torch.equal(changes.labels()[:, :2], torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]))
    assert torch.equal(flipped(images, torch.tensor([True, False, False, False]), 3)[1:], images[1:])


def test_labels_are_edms_nine_in_order():
    each = {"flip_x": 1, "flip_y": 1, "scale": 0.7, "rotation": 0.5, "stretch": -0.6, "axis": 2.0, "right": 1.2, "down": -0.4}
    turned, stretched = [np.cos(0.5) - 1, np.sin(0.5)], [-0.6 * np.cos(2), -0.6 * np.sin(2)]
    assert only(**each).labels()[0].tolist() == pytest.approx([1, 1, 0.7, *turned, *stretched, 1.2, -0.4])
    assert only(axis=2.0).labels().abs().max() == 0 and not only(axis=2.0).moved().any()


def call(augmentation, images, first=0, stream="stream", seed=3):
    return augmentation(images, seed, stream, np.arange(first, first + len(images)))


def test_probability_zero_is_the_identity():
    images = noise(50, 3, 8, 8)
    same, labels = call(UNCHANGED, images)
    assert torch.equal(same, images) and labels is None
    n = np.arange(500)
    none = drawn(0.0, uniform(0, "s", n, 10), normal(0, "s", n, (4,)))
    assert not none.labels().any() and not none.moved().any()
    assert torch.equal(changed(noise(500, 1, 4, 4), none), noise(500, 1, 4, 4))


def test_plain_flips_are_fair_and_tell_nobody():
    images = noise(1000, 1, 2, 3)
    mirrored, labels = call(Augmentation(flips=True), images)
    same = (mirrored == images).flatten(1).all(1)
    assert torch.equal(torch.where(same[:, None, None, None], images, images.flip(3)), mirrored)
    assert labels is None and same.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_each_change_has_its_probability():
    """x-flips: half of the images whatever p; y-flips: half of p; the others: p. Half of the axes are tilted."""
    n, p = 40_000, 0.12
    changes = drawn(p, uniform(1, "s", np.arange(n), 10), normal(1, "s", np.arange(n), (4,)))
    found = {name: (getattr(changes, name) != 0).double().mean().item() for name in NAMES}
    expected = {"flip_x": 0.5, "flip_y": p / 2, "axis": 0.5}
    assert found == pytest.approx({name: expected.get(name, p) for name in NAMES}, abs=0.008)
    assert torch.equal(changes.right != 0, changes.down != 0)
    for name in ("scale", "stretch", "right", "down"):
        values = getattr(changes, name)[getattr(changes, name) != 0]
        assert values.mean().item() == pytest.approx(0, abs=0.06) and values.std().item() == pytest.approx(1, abs=0.05)
    for name in ("rotation", "axis"):
        values = getattr(changes, name)[getattr(changes, name) != 0]
        assert values.abs().max() <= torch.pi and values.std().item() == pytest.approx(torch.pi / 3**0.5, rel=0.03)
    together = ((changes.scale != 0) & (changes.rotation != 0)).double().mean().item()
    assert together == pytest.approx(p * p, abs=0.003)  # they are independent of each other


def test_nothing_leaks():
    """An image whose labels are all 0 is the image itself, any other is not; so sampling, with labels 0, is of the data."""
    images = noise(600, 1, 8, 8)
    new, labels = call(Augmentation(probability=0.3), images)
    plain = (labels == 0).all(1)
    assert plain.float().mean().item() == pytest.approx(0.5 * 0.85 * 0.7**4, abs=0.05)
    assert torch.equal(plain, (new == images).flatten(1).all(1))
    assert torch.isfinite(new).all() and new.abs().max() < 5


@pytest.mark.parametrize("augmentation", [Augmentation(True), Augmentation(True, 0.5), Augmentation(False, 0.12)])
def test_positions_decide_and_not_the_batch(augmentation, monkeypatch):
    images = noise(60, 3, 8, 8)
    whole, labels = call(augmentation, images, first=100)
    monkeypatch.setattr(augment, "CHUNK", {"cpu": 1})  # image by image
    for size in (1, 7):
        parts = [call(augmentation, part, first=100 + size * i) for i, part in enumerate(images.split(size))]
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole, rtol=0, atol=1e-5)
        assert labels is None or torch.equal(torch.cat([found for _, found in parts]), labels)
    for other in ({"first": 101}, {"first": 100, "seed": 4}, {"first": 100, "stream": "other"}):
        assert not torch.equal(call(augmentation, images, **other)[0], whole)
