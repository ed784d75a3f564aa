import gzip
import struct
from importlib.resources import files

import numpy as np
import pytest
import torch

from reflow_lab.data.fashion import FashionMNIST, read_idx
from reflow_lab.data.sources import SPLITS
from reflow_lab.errors import UserError

HASHES = {
    "train": "525b8e8f2eb45cb916d8e1f4b96de47693f14d49846777e0f89634e172172d51",
    "reference": "167ec70a017e3f536dfe8aded2a63bb012ea45069a25baafd1527d81d75e23c5",
    "floor": "4213626bca6f58aee0bcac64ae6e594fb736329ca1172cb0166b986ac368db21",
}


@pytest.fixture(scope="module")
def source() -> FashionMNIST:
    return FashionMNIST()


@pytest.mark.parametrize("name", SPLITS)
def test_split_is_pinned(source, name):
    assert source.split(name).content_hash == HASHES[name]


@pytest.mark.parametrize(("name", "each"), [("train", 500), ("reference", 250), ("floor", 250)])
def test_sizes_classes_and_background(source, name, each):
    held = source.split(name)
    assert held.images.shape == (10 * each, 1, 32, 32) and held.images.max() == 255
    assert torch.bincount(held.labels).tolist() == [each] * 10
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:30, 2:30] = False
    assert not held.images[:, 0, frame].any()


def test_splits_hold_all_images_once(source):
    crops = np.concatenate([source.split(name).images[:, 0, 2:30, 2:30].numpy() for name in SPLITS])
    shipped = read_idx_of_package("t10k-images-idx3-ubyte.gz")
    assert sorted(image.tobytes() for image in crops) == sorted(image.tobytes() for image in shipped)


def test_labels_stay_with_their_images(source):
    shipped = zip(read_idx_of_package("t10k-images-idx3-ubyte.gz"), read_idx_of_package("t10k-labels-idx1-ubyte.gz"), strict=True)
    label_of = {image.tobytes(): int(label) for image, label in shipped}
    held = source.split("floor")
    assert all(label_of[x[0, 2:30, 2:30].numpy().tobytes()] == label for x, label in zip(held.images, held.labels, strict=True))


def read_idx_of_package(name):
    return read_idx(files("reflow_lab.data") / "fashion_mnist" / name)


def test_a_split_is_read_once(source):
    assert source.split("train") is source.split("train")


def test_other_resolutions(source):
    bare = FashionMNIST(resolution=28).split("floor").images
    assert bare.shape[-1] == 28 and torch.equal(bare, source.split("floor").images[..., 2:30, 2:30])


@pytest.mark.parametrize(
    ("key", "value"), [("resolution", 16), ("resolution", 33), ("resolution", 32.0), ("channels", 3), ("num_classes", 0)]
)
def test_impossible_facts_are_refused(key, value):
    with pytest.raises(UserError, match=f"^data.{key}={value}: [^\n]+$"):
        FashionMNIST(**{key: value})


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}i", *shape) + data


def test_read_idx_returns_the_bytes(tmp_path):
    file = tmp_path / "x.gz"
    file.write_bytes(gzip.compress(idx((2, 3), b"abcdef"), mtime=0))
    assert read_idx(file).tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx((2, 3), b"abcdef"), mtime=0)[:-9],
        gzip.compress(idx((2, 3), b"abcde"), mtime=0),
        gzip.compress(idx((2, 3), b"abcdefg"), mtime=0),
        gzip.compress(b"\0\0\x0d\x01 floats", mtime=0),
        gzip.compress(b"\0\0\x08\x03", mtime=0),
        gzip.compress(b"", mtime=0),
        b"no gzip",
        b"",
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, content):
    file = tmp_path / "x.gz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"^\S+x\.gz: not a readable idx\.gz[^\n]+$"):
        read_idx(file)
