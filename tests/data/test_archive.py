import io
import json
import multiprocessing
import os
import signal
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab.data import archive
from reflow_lab.data.archive import Archive
from reflow_lab.data.sources import partition
from reflow_lab.data.zips import ZipMembers, central_directory
from reflow_lab.errors import UserError

LABELS = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 0, 5]


def pixels(count: int = 12, side: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def png(image: np.ndarray, mode: str | None = None, **options) -> bytes:
    """As EDM's tool writes it."""
    out = io.BytesIO()
    made = Image.fromarray(image.transpose(1, 2, 0).squeeze())
    (made.convert(mode) if mode else made).save(out, format="png", compress_level=0, optimize=False, **options)
    return out.getvalue()


def name(number: int) -> str:
    return f"{number // 1000:05d}/img{number:08d}.png"


def contents(images: np.ndarray, labels=LABELS) -> dict[str, bytes]:
    """Names and files of an archive, in the order in which EDM's tool writes them."""
    files = {name(number): png(image) for number, image in enumerate(images)}
    pairs = None if labels is None else [[name(number), label] for number, label in enumerate(labels)]
    return {**files, "dataset.json": json.dumps({"labels": pairs}).encode()}


def packed(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for inner, raw in files.items():
            out.writestr(inner, raw)
    return path


def unpacked(path, files: dict[str, bytes]):
    for inner, raw in files.items():
        (path / inner).parent.mkdir(parents=True, exist_ok=True)
        (path / inner).write_bytes(raw)
    return path


@pytest.fixture
def edm(tmp_path):
    return packed(tmp_path / "edm-8x8.zip", contents(pixels()))


def source(path, **options) -> Archive:
    return Archive(str(path), **{"resolution": 8, "num_classes": 10, **options})


def said(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **options).split("train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shuffled(labels=LABELS, count: int = 12) -> np.ndarray:
    """The order in which a set has an archive's images."""
    (order,) = partition(np.zeros(count, np.int64) if labels is None else np.array(labels), (1.0,), "archive")
    return order


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("pack", [packed, unpacked])
def test_every_pixel_and_label_arrives(tmp_path, pack, cached):
    path = pack(tmp_path / "edm-8x8.zip", contents(pixels()))
    held = source(path, cache=str(tmp_path / "cache") if cached else None).split("train")
    assert np.array_equal(held.images, pixels()[shuffled()]) and held.labels.tolist() == [LABELS[i] for i in shuffled()]
    assert held.images.dtype == torch.uint8 and held.name == "archive/train"


def test_order_is_that_of_the_names(tmp_path):
    files = contents(pixels())
    path = packed(tmp_path / "x.zip", dict(reversed(files.items())))
    assert np.array_equal(source(path).split("train").images, pixels()[shuffled()])


def test_the_first_images_of_a_sorted_archive_are_a_sample(tmp_path):
    labels = [k // 50 for k in range(200)]
    path = packed(tmp_path / "x.zip", contents(pixels(200), labels))
    first = source(path, num_classes=4).split("train").labels[:40].tolist()
    assert {first.count(k) for k in range(4)} <= set(range(3, 20))


def test_mapped_and_in_memory_are_equal_and_so_are_their_hashes(tmp_path, edm):
    memory, mapped = source(edm).split("train"), source(edm, cache=str(tmp_path)).split("train")
    assert torch.equal(memory.images, mapped.images) and torch.equal(memory.labels, mapped.labels)
    assert mapped.known_hash == memory.content_hash == mapped.content_hash
    assert isinstance(np.load(next(tmp_path.rglob("images.npy")), mmap_mode="r"), np.memmap)


def test_a_second_use_reads_nothing_of_the_archive_but_its_directory(tmp_path, edm, monkeypatch):
    first = source(edm, cache=str(tmp_path)).split("train")
    monkeypatch.setattr(ZipMembers, "read", None)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    again = source(edm, cache=str(tmp_path)).split("train")
    assert torch.equal(first.images, again.images) and again.content_hash == first.content_hash


def test_another_archive_of_the_same_name_is_decoded_anew(tmp_path, edm):
    source(edm, cache=str(tmp_path / "cache")).split("train")
    other = pixels()[::-1].copy()
    packed(edm, contents(other))
    assert np.array_equal(source(edm, cache=str(tmp_path / "cache")).split("train").images, other[shuffled()])


def test_the_directory_holds_every_check_sum(edm):
    with zipfile.ZipFile(edm) as file, edm.open("rb") as raw:
        directory = central_directory(raw)
        assert all(struct.pack("<III", i.CRC, i.compress_size, i.file_size) in directory for i in file.infolist())


def test_directory_of_a_large_zip(tmp_path, edm, monkeypatch):
    """With more members than its records count, zip64's say where the directory is."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    path = packed(tmp_path / "x.zip", contents(pixels()))
    assert b"PK\x06\x06" in path.read_bytes() and b"PK\x06\x06" not in edm.read_bytes()
    with path.open("rb") as raw:
        directory = central_directory(raw)
    assert directory.startswith(b"PK\x01\x02") and directory.count(b"PK\x01\x02") == 13


def test_without_classes_labels_are_not_read(tmp_path):
    path = packed(tmp_path / "x.zip", contents(pixels(), labels=None))
    assert source(path, num_classes=0).split("train").labels is None
    assert said(path) == f"data.path={path}: its dataset.json has no labels: set data.num_classes=0"


def test_grey_images(tmp_path):
    path = packed(tmp_path / "x.zip", contents(pixels(channels=1)))
    assert np.array_equal(source(path, channels=1).split("train").images, pixels(channels=1)[shuffled()])


def test_without_images_kept_apart_the_floor_is_empty(edm):
    data = source(edm)
    assert data.split("reference") is data.split("train")
    floor = data.split("floor")
    assert floor.images.shape == (0, 3, 8, 8) and floor.labels.shape == (0,)


@pytest.mark.parametrize("cached", [False, True])
def test_a_fraction_leaves_the_rest_as_floor(tmp_path, cached):
    images, labels = pixels(40), [number % 2 for number in range(40)]
    path = packed(tmp_path / "x.zip", contents(images, labels))
    data = source(path, train_fraction=0.75, num_classes=2, cache=str(tmp_path) if cached else None)
    train, floor = data.split("train"), data.split("floor")
    assert (len(train), len(floor)) == (30, 10) and train.labels.bincount().tolist() == [15, 15]
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    both = [pair for held in (train, floor) for pair in zip(held.images.numpy(), held.labels.tolist(), strict=True)]
    found = [(image.tobytes(), label) for image, label in both]
    assert len(found) == len(set(found)) == 40 and all(label_of[image] == label for image, label in found)
    for held in (train, floor):  # the hash that was found while decoding is the content's
        assert held.content_hash == archive.ImageSet(held.images.clone(), held.labels, "").content_hash


def test_floor_from_another_archive_may_lack_classes(tmp_path, edm):
    other = packed(tmp_path / "test.zip", contents(pixels(3)[::-1].copy(), [0, 1, 1]))
    floor = source(edm, floor=str(other)).split("floor")
    order = shuffled([0, 1, 1], 3)
    assert np.array_equal(floor.images, pixels(3)[::-1][order]) and floor.labels.tolist() == [[0, 1, 1][i] for i in order]


@pytest.mark.slow  # other processes import torch anew
def test_several_processes_decode_the_same(tmp_path, edm, monkeypatch):
    monkeypatch.setattr(archive, "CHUNK", 5)
    alone = source(edm).split("train")
    monkeypatch.setattr(archive, "sensible_workers", lambda count, enough: 2)
    together = source(edm).split("train")
    assert torch.equal(alone.images, together.images)


def decode_slowly(path, cache, begun) -> None:
    def slow(self, names):
        begun.set()
        time.sleep(1)  # a busy machine may be long in killing it
        return np.zeros((len(names), 3, 8, 8), np.uint8)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    archive.Decoder.__call__, archive.CHUNK = slow, 1
    source(path, cache=str(cache)).split("train")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_decoding_that_was_killed_is_done_again_and_leaves_nothing(tmp_path, edm, how):
    cache, processes = tmp_path / "cache", multiprocessing.get_context("fork")
    begun = processes.Event()
    process = processes.Process(target=decode_slowly, args=(edm, cache, begun))
    process.start()
    assert begun.wait(20)
    os.kill(process.pid, how)
    process.join(20)
    assert process.exitcode != 0
    left = list(cache.rglob(".images.npy*"))
    assert len(left) == (how == signal.SIGKILL) and not list(cache.rglob("done.json"))
    assert np.array_equal(source(edm, cache=str(cache)).split("train").images, pixels()[shuffled()])
    assert not list(cache.rglob("*.tmp")) and len(list(cache.iterdir())) == 1


def test_a_full_disk_is_said_before_the_work(tmp_path, edm, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 2000}))
    monkeypatch.setattr(archive, "decoded", None)
    line = said(edm, cache=str(tmp_path / "cache"))
    assert line.startswith(f"data.cache={tmp_path}/cache/") and "2e-06 GB are free; name another place" in line


# What can be wrong with an archive: each is one line that names it.


def test_no_such_file(tmp_path):
    assert said(tmp_path / "no.zip").startswith(f"data.path={tmp_path}/no.zip: no such file or folder")
    with pytest.raises(UserError, match=r"^data\.path=null: must name a \.zip or a folder as EDM's dataset tool"):
        Archive(None).split("train")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kept", [0, 10, 1000, -1, -60])
def test_no_zip_or_one_cut_short(tmp_path, edm, kept, cached):
    edm.write_bytes(edm.read_bytes()[:kept])
    line = said(edm, cache=str(tmp_path) if cached else None)
    assert line.startswith(f"data.path={edm}: not a readable zip archive: it is something else, or was cut short")


@pytest.mark.parametrize("pack", [packed, unpacked])
def test_no_images_and_no_labels(tmp_path, pack):
    empty = pack(tmp_path / "empty", {"dataset.json": b'{"labels": null}'})
    assert said(empty).startswith(f"data.path={empty}: holds no PNG; it must be a .zip or a folder")
    bare = pack(tmp_path / "bare", {name(0): png(pixels()[0])})
    assert said(bare).startswith(f"data.path={bare}: holds no dataset.json; ")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (LABELS[:-1], "11 labels, but there are 12 images"),
        ([*LABELS, 3], "13 labels, but there are 12 images"),
        ([*LABELS[:-1], 2.5], f"the label of {name(11)} is 2.5, must be a whole number of at least 0"),
        ([*LABELS[:-1], True], f"the label of {name(11)} is True, must be"),
        ([*LABELS[:-1], -1], f"the label of {name(11)} is -1, must be"),
        ([*LABELS[:-1], [0, 1]], f"the label of {name(11)} is [0, 1], must be"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, problem):
    path = packed(tmp_path / "x.zip", contents(pixels(), labels))
    assert said(path).startswith(f"data.path={path}: dataset.json: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ({"labels": [["a.png", 1]] * 12}, "12 labels, 11 of them for a name that has one, but there are 12 images"),
        ({"labels": [[f"{n}.png", 1] for n in range(12)]}, f"has no label for {name(0)}"),
        ({"labels": [1, 2, 3]}, "not a readable list of labels (TypeError: "),
        ({"label": []}, "not a readable list of labels (KeyError: 'labels')"),
        ([], "not a readable list of labels (TypeError: "),
    ],
)
def test_label_files_of_another_make(tmp_path, text, problem):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), "dataset.json": json.dumps(text).encode()})
    assert said(path).startswith(f"data.path={path}: dataset.json: {problem}")


def test_a_label_file_that_is_no_json(tmp_path):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), "dataset.json": b"{"})
    assert said(path).startswith(f"data.path={path}: dataset.json: not a readable list of labels (JSONDecodeError: ")


@pytest.mark.parametrize("classes", [5, 1000])
def test_another_number_of_classes(edm, classes):
    assert said(edm, num_classes=classes) == f"data.num_classes={classes}: the labels in {edm} are 0 to 9, that is 10 classes"


def test_another_resolution_or_other_channels_than_configured(edm):
    assert said(edm, resolution=16) == f"data.path={edm}: {name(0)}: is 8x8 RGB, but data.resolution=16"
    assert said(edm, channels=1) == f"data.path={edm}: {name(0)}: is 8x8 RGB, but data.channels=1 needs L"


@pytest.mark.parametrize(
    ("odd", "size"),
    [
        (png(pixels(1, side=16)[0]), "16x16 RGB"),
        (png(pixels(1, channels=1)[0]), "8x8 L"),
        (png(pixels(1)[0], mode="RGBA"), "8x8 RGBA"),
        (png(pixels(1)[0], mode="P"), "8x8 P"),
    ],
)
def test_mixed_sizes_and_modes(tmp_path, odd, size):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), name(7): odd})
    assert said(path) == f"data.path={path}: {name(7)}: is {size}, the images before it 8x8 RGB"


@pytest.mark.parametrize("raw", [b"", b"GIF89a" * 9, png(pixels(1)[0])[:20], png(pixels(1)[0])[:90], png(pixels(1)[0])[:-40]])
@pytest.mark.parametrize("number", [0, 7])
def test_a_corrupt_image_is_named(tmp_path, raw, number):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), name(number): raw})
    assert said(path).startswith(f"data.path={path}: {name(number)}: not a readable PNG (")


def test_a_flipped_bit_is_named(edm):
    raw = bytearray(edm.read_bytes())
    at = raw.index(name(5).encode()) + 150
    raw[at] ^= 1
    edm.write_bytes(raw)
    assert f"data.path={edm}: {name(5)}: not a readable file (BadZipFile: Bad CRC-32" in said(edm)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims to be large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1025, 8), (8, 1025), (12_000, 9_000), (60_000, 60_000)])
@pytest.mark.parametrize("number", [0, 7])
def test_a_large_image_is_refused_by_its_header(tmp_path, size, number, recwarn):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), name(number): bomb(*size)})
    line = f"is {size[0]}x{size[1]}, larger than 1024x1024, the largest that is read"
    assert said(path) == f"data.path={path}: {name(number)}: {line}" and not recwarn.list


def test_a_member_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("dataset.json", '{"labels": null}')
        out.writestr(name(0), bytes((16 << 20) + 1))
    assert path.stat().st_size < 100_000
    assert said(path, num_classes=0) == f"data.path={path}: {name(0)}: has 16,777,217 bytes, at most 16,777,216 are read"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", 0),
        ("resolution", 2048),
        ("channels", 4),
        ("num_classes", -1),
        ("train_fraction", 0),
        ("train_fraction", 1.5),
    ],
)
def test_impossible_arguments_are_refused(key, value):
    with pytest.raises(UserError, match=f"^data.{key}={value}: [^\n]+$"):
        Archive("x", **{key: value})


def test_two_floors_are_refused():
    with pytest.raises(UserError, match=r"^data\.train_fraction=0\.5: must be 1 where data\.floor names"):
        Archive("x", floor="y", train_fraction=0.5)


def test_finder_shadows_are_passed_over(tmp_path):
    path = packed(tmp_path / "x.zip", {**contents(pixels()), "__MACOSX/00000/._x.png": b"shadow", "00000/.x.png": b""})
    assert len(source(path).split("train")) == 12


def test_a_cache_that_may_only_be_read_serves(tmp_path, edm):
    cache = tmp_path / "cache"
    source(edm, cache=str(cache)).split("train")
    folder = next(cache.iterdir())
    (folder / ".lock").unlink()
    folder.chmod(0o500)
    try:
        assert len(source(edm, cache=str(cache)).split("train")) == 12
        assert os.geteuid() == 0 or not (folder / ".lock").exists()
    finally:
        folder.chmod(0o700)
