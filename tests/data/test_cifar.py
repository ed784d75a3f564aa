import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab.data import cifar
from reflow_lab.data.cifar import BATCHES, CIFAR10, decode_batch
from reflow_lab.errors import UserError

NAMES = (*BATCHES["train"], *BATCHES["test"])


def batch(seed: int, num: int = 4) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, 3072), dtype=np.uint8), rng.integers(0, 10, num).tolist()


def dump(data: object, labels: object, protocol: int = 4) -> bytes:
    return pickle.dumps({b"batch_label": b"x", b"labels": labels, b"data": data, b"filenames": [b"a.png"]}, protocol=protocol)


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """Written opcode by opcode as Python 2 wrote the original batches: byte strings, and NumPy's names of that time."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
    shape = f"(I{data.shape[0]}\nI{data.shape[1]}\nt".encode()
    state = b"(I1\n" + shape + dtype + b"I00\nT" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    numbers = b"(" + b"".join(f"I{label}\n".encode() for label in labels) + b"l"
    return b"\x80\x02(U\x04data" + array + state + b"U\x06labels" + numbers + b"d."


def archive(path, contents: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {"batches.meta": b"meta"} | {name: dump(*batch(seed)) for seed, name in enumerate(NAMES)}


@pytest.fixture
def tiny(tmp_path, contents) -> CIFAR10:
    return CIFAR10(str(archive(tmp_path / "tiny.tar.gz", contents)), check_md5=False)


def expected(seeds) -> tuple[torch.Tensor, list[int]]:
    parts = [batch(seed) for seed in seeds]
    images = torch.from_numpy(np.concatenate([data for data, _ in parts])).reshape(-1, 3, 32, 32)
    return images, [label for _, labels in parts for label in labels]


def test_archive_is_read_byte_for_byte(tiny):
    for name, seeds in (("train", range(5)), ("floor", [5])):
        images, labels = expected(seeds)
        assert torch.equal(tiny.split(name).images, images) and tiny.split(name).labels.tolist() == labels


def test_reference_is_the_training_set_and_floor_the_test_set(tiny):
    assert tiny.split("reference") is tiny.split("train") is tiny.split("train")
    assert (tiny.split("train").name, tiny.split("floor").name) == ("cifar10/train", "cifar10/test")


@pytest.mark.parametrize("inner", [".", "cifar-10-batches-py"])
def test_extracted_folder_equals_the_archive(tmp_path, contents, tiny, inner):
    folder = tmp_path / "extracted"
    (folder / inner).mkdir(parents=True)
    for name, raw in contents.items():
        (folder / inner / name).write_bytes(raw)
    assert CIFAR10(str(folder)).split("train").content_hash == tiny.split("train").content_hash


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3(protocol):
    data, labels = batch(7)
    images, found = decode_batch(dump(data, labels, protocol))
    assert np.array_equal(images.reshape(4, 3072), data) and found.tolist() == labels


def test_pickles_of_python_2_as_in_the_original():
    data, labels = batch(8)
    raw = python2_pickle(data, labels)
    assert np.array_equal(pickle.loads(raw, encoding="bytes")[b"data"], data)  # the opcodes above mean what they should
    images, found = decode_batch(raw)
    assert np.array_equal(images.reshape(4, 3072), data) and found.tolist() == labels


def test_fortran_order_is_obeyed():
    data, labels = batch(9)
    images, _ = decode_batch(dump(np.asfortranarray(data), labels))
    assert np.array_equal(images.reshape(4, 3072), data)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_no_code_in_a_pickle_is_run(tmp_path, contents):
    contents["data_batch_2"] = dump(Evil(tmp_path / "owned"), [1])
    path = archive(tmp_path / "evil.tar.gz", contents)
    with pytest.raises(UserError, match=r"data\.path=\S+evil.tar.gz: data_batch_2: not a readable batch[^\n]+mkdir"):
        CIFAR10(str(path), check_md5=False).split("train")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (batch(0)[0], [1, 2, 3]),
        (batch(0)[0], [1, 2, 3, 10]),
        (batch(0)[0], [1, 2, 3, -1]),
        (batch(0)[0], [1, 2, 3, 1.5]),
        (batch(0)[0], 5),
        (batch(0)[0][:, :3071], [1, 2, 3, 4]),
        (batch(0)[0].astype(np.float32), [1, 2, 3, 4]),
        (np.array([None, {}]), [1, 2]),
        ([1, 2], [1, 2]),
        (None, None),
    ],
)
def test_batches_that_do_not_fit_are_named(tmp_path, contents, data, labels):
    contents["test_batch"] = dump(data, labels)
    path = archive(tmp_path / "odd.tar.gz", contents)
    with pytest.raises(UserError, match=r"^data\.path=\S+odd.tar.gz: test_batch: not a readable batch of CIFAR-10 [^\n]+$"):
        CIFAR10(str(path), check_md5=False).split("floor")


@pytest.mark.parametrize("raw", [b"", b"\x80\x04]."])
def test_pickles_that_are_no_dictionary(raw):
    with pytest.raises((EOFError, ValueError)):
        decode_batch(raw)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_archive(tmp_path, tiny, kept):
    path = tmp_path / "tiny.tar.gz"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"^data\.path=\S+tiny.tar.gz: not a readable copy of cifar-10-python.tar.gz [^\n]+$"):
        tiny.split("train")


def test_truncated_batch_in_a_folder(tmp_path, contents):
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r": data_batch_1: not a readable batch"):
        CIFAR10(str(tmp_path)).split("train")


def test_missing_batch(tmp_path, contents):
    del contents["data_batch_4"]
    path = archive(tmp_path / "tiny.tar.gz", contents)
    with pytest.raises(UserError, match=r"holds no data_batch_4; it must be https"):
        CIFAR10(str(path), check_md5=False).split("train")


def test_oversized_batch(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_BATCH_BYTES", 1000)
    with pytest.raises(UserError, match="at most 1,000 are read"):
        tiny.split("floor")


def test_md5_is_compared(tmp_path, contents, monkeypatch):
    path = archive(tmp_path / "tiny.tar.gz", contents)
    with pytest.raises(UserError, match=r"its MD5 is \w{32}, the original's c58f30108f718f92721af3b95e74349a: fetch"):
        CIFAR10(str(path)).split("train")
    monkeypatch.setattr(cifar, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    assert len(CIFAR10(str(path)).split("train")) == 20


def test_missing_archive_says_what_to_put_where(tmp_path):
    source = CIFAR10(str(tmp_path / "none.tar.gz"))
    with pytest.raises(
        UserError, match=r"^data\.path=\S+none.tar.gz: no such[^\n]+fetch https://www.cs.toronto.edu\S+ and put it at /"
    ):
        source.split("train")


@pytest.mark.parametrize(
    ("key", "value"), [("source", "zip"), ("channels", 1), ("resolution", 64), ("num_classes", 0), ("path", None)]
)
def test_impossible_arguments_are_refused(key, value):
    with pytest.raises(UserError, match=f"^data.{key}={value}: [^\n]+$"):
        CIFAR10(**({"path": "x"} | {key: value}))


def sheet_of(images: np.ndarray, columns: int) -> Image.Image:
    rows = [np.concatenate(list(images[start : start + columns]), axis=1) for start in range(0, len(images), columns)]
    return Image.fromarray(np.concatenate(rows))


@pytest.fixture
def sheets(tmp_path):
    folder = tmp_path / "sheets"
    folder.mkdir()
    tiles = np.random.default_rng(0).integers(0, 256, (10, 6, 32, 32, 3), dtype=np.uint8)
    for label in range(10):
        for part in ("train", "test"):
            sheet_of(tiles[label], 3).save(folder / f"{part}_{label}_name.webp", lossless=True)
    return folder, tiles


def test_sheets_are_read_byte_for_byte_with_their_labels(sheets):
    folder, tiles = sheets
    held = CIFAR10(str(folder), source="sheets").split("train")
    label_of = {tile.transpose(2, 0, 1).tobytes(): label for label in range(10) for tile in tiles[label]}
    assert {image.numpy().tobytes(): int(label) for image, label in zip(held.images, held.labels, strict=True)} == label_of


def test_sheets_are_shuffled_always_alike(sheets):
    one, two = (CIFAR10(str(sheets[0]), source="sheets").split("train") for _ in range(2))
    assert one.content_hash == two.content_hash
    assert one.labels.tolist() != sorted(one.labels.tolist())


def test_missing_sheets(sheets, tmp_path):
    (sheets[0] / "test_3_name.webp").unlink()
    with pytest.raises(UserError, match=r"holds 0 files test_3_\*\.webp, must be exactly one"):
        CIFAR10(str(sheets[0]), source="sheets").split("floor")
    with pytest.raises(UserError, match=r"data\.path=\S+none: no such folder"):
        CIFAR10(str(tmp_path / "none"), source="sheets").split("floor")


def test_damaged_sheet_is_named(sheets):
    file = sheets[0] / "train_6_name.webp"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"^data\.path=\S+train_6_name\.webp: not a readable sheet[^\n]+$"):
        CIFAR10(str(sheets[0]), source="sheets").split("train")


def test_sheet_of_broken_tiles_is_named(sheets):
    Image.new("RGB", (96, 50)).save(sheets[0] / "train_6_name.webp", lossless=True)
    with pytest.raises(UserError, match=r"96x50 pixels are not whole tiles"):
        CIFAR10(str(sheets[0]), source="sheets").split("train")
