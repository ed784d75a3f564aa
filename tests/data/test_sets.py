import hashlib

import numpy as np
import pytest
import torch

from reflow_lab.data.sets import ImageSet, PointSet, resident, to_float, to_uint8


def images(num: int = 12, labels: bool = True) -> ImageSet:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, 4, 5), dtype=np.uint8))
    return ImageSet(pixels, torch.arange(num) % 3 if labels else None, "test")


def test_bytes_survive_the_way_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_to_float_has_the_stated_range_and_slope():
    assert to_float(torch.tensor([0, 255, 51], dtype=torch.uint8)).tolist() == pytest.approx([-1, 1, -0.6])


def test_to_uint8_rounds_and_clamps():
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0039, -0.0041])).tolist() == [0, 255, 128, 127]


def test_conversions_leave_their_argument_alone():
    x = torch.tensor([0.5])
    to_uint8(x)
    assert x.item() == 0.5


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_take_gathers_in_order_and_converts(kind):
    held, where = images(), kind([5, 0, 5])
    x0, label = held.take(where)
    assert x0.dtype == torch.float32 and torch.equal(x0, held.images[[5, 0, 5]] / 127.5 - 1)
    assert label is not None and label.tolist() == [2, 0, 2]


def test_take_without_labels():
    assert images(labels=False).take(np.array([1]))[1] is None


def test_take_refuses_an_index_outside():
    with pytest.raises(IndexError):
        images().take(np.array([12]))


def test_length_and_shape():
    assert len(images()) == 12 and images().shape == (3, 4, 5)


def test_content_hash_is_of_shape_pixels_and_labels():
    held = images()
    expected = hashlib.sha256(b"((12, 3, 4, 5), True)" + held.images.numpy().tobytes() + held.labels.numpy().tobytes())
    assert held.content_hash == expected.hexdigest()


def test_content_hash_sees_every_part_but_the_name():
    held = images()
    changed = held.images.clone()
    changed[7, 1, 2, 3] ^= 1
    reshaped = ImageSet(held.images.reshape(12, 3, 5, 4), held.labels, "test")
    others = [
        ImageSet(changed, held.labels, "test"),
        ImageSet(held.images, 2 - held.labels, "test"),
        images(labels=False),
        reshaped,
    ]
    assert len({held.content_hash, *(other.content_hash for other in others)}) == 5
    assert ImageSet(held.images, held.labels, "other").content_hash == held.content_hash


def test_content_hash_ignores_memory_layout():
    held = images()
    strided = held.images.contiguous(memory_format=torch.channels_last)
    assert ImageSet(strided, held.labels, "test").content_hash == held.content_hash


def test_to_moves_samples_and_labels():
    moved = images().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta" and moved.name == "test"


def test_wrong_kinds_of_tensors_are_caught():
    with pytest.raises(AssertionError):
        ImageSet(torch.zeros(2, 1, 4, 4), None, "floats")
    with pytest.raises(AssertionError):
        ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels")


def test_points_are_taken_as_they_are_and_named_by_their_recipe():
    points = PointSet(torch.randn(6, 2), torch.arange(6), "p", recipe="a")
    x0, label = points.take(np.array([4, 1]))
    assert torch.equal(x0, points.points[[4, 1]]) and label.tolist() == [4, 1]
    assert len(points) == 6 and points.shape == (2,)
    assert points.content_hash == hashlib.sha256(b"a").hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_set_on_the_gpu_gives_the_same_batch():
    held, where = images(), np.array([3, 3, 11])
    expected = held.take(where)
    for x0, label in (held.to("cuda").take(where), held.take(where, device="cuda")):
        assert x0.device.type == label.device.type == "cuda"
        torch.testing.assert_close(x0.cpu(), expected[0])
        assert torch.equal(label.cpu(), expected[1])
    assert held.to("cuda").content_hash == held.content_hash


def test_a_known_hash_is_not_computed_and_stays():
    held = ImageSet(images().images, None, "test", known_hash="abc")
    assert held.content_hash == held.to("meta").content_hash == held.delivered("cpu").content_hash == "abc"


def test_what_fits_lies_on_the_device_and_the_rest_is_delivered(monkeypatch):
    held, needed = images(), images().images.nbytes
    assert torch.equal(resident(held, "cpu").images, held.images)
    moves = []
    monkeypatch.setattr(ImageSet, "to", lambda self, device: moves.append(str(device)) or self)
    for free, lies in ((4 * needed, ["cuda:0"]), (4 * needed - 1, [])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        moves.clear()
        found = resident(held, torch.device("cuda", 0))
        assert moves == lies and (found.device.type == "cuda") == (not lies)
        assert found.held.device.type == "cpu"  # the same bytes: nothing was copied


def test_batches_are_delivered_to_the_destination():
    held = images().delivered("meta")
    x0, label = held.take(np.array([4, 1]))
    assert x0.device.type == label.device.type == "meta" and held.held.device.type == "cpu"
    assert held.take(np.array([4]), device="cpu")[0].device.type == "cpu"
