import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab.cli import main
from reflow_lab.data import prepare
from reflow_lab.data.archive import Archive
from reflow_lab.data.folder import TRANSFORMS, centre_crop_dhariwal
from reflow_lab.data.sources import partition
from reflow_lab.data.zips import encode_png


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def saved(folder: Path, names: dict[str, int]) -> Path:
    """PNG files by name, each a picture of that seed."""
    for name, seed in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path, "png")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    def run(*words) -> tuple[int, str, str]:
        status = main(["data", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def refused(run, *words) -> str:
    status, _, err = run(*words)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("reflow-lab: ")]
    return line.removeprefix("reflow-lab: ")


def read(path, **options) -> tuple[np.ndarray, list[int] | None]:
    """The images and labels of an archive in the order of their names, which a set shuffles."""
    held = Archive(str(path), **options).split("train")
    with zipfile.ZipFile(path) as file:
        pairs = json.loads(file.read("dataset.json"))["labels"]
    labels = np.zeros(len(held), np.int64) if held.labels is None else np.array([label for _, label in pairs])
    place = np.argsort(partition(labels, (1.0,), "archive")[0])
    return held.images.numpy()[place], None if held.labels is None else held.labels[torch.from_numpy(place)].tolist()


ANIMALS = {"dog/b.png": 1, "cat/a.png": 2, "dog/a.png": 3, "cat/deeper/c.png": 4}


def test_a_folder_becomes_what_edm_reads(work, run):
    """Images in the order of their names, cropped to the middle and resized; sub-folders, sorted, are the classes."""
    status, out, _ = run("folder", "--source", saved(work / "mine", ANIMALS), "--resolution", 8, "--labels", "--out", "x.zip")
    assert status == 0 and "x.zip: 4 images of 8x8, 2 classes" in out
    assert hashlib.sha256((work / "x.zip").read_bytes()).hexdigest() in out
    keys = "data.path=x.zip data.resolution=8 data.channels=3 data.num_classes=2 data.train_fraction=0.8"
    assert f"reflow-lab train experiment=custom_base data=archive {keys}" in out
    with zipfile.ZipFile("x.zip") as file:
        assert file.namelist() == [*(f"00000/img0000000{i}.png" for i in range(4)), "dataset.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        labels = json.loads(file.read("dataset.json"))["labels"]
        assert labels[0] == ["00000/img00000000.png", 0] and Image.open(file.open("00000/img00000000.png")).mode == "RGB"
    images, classes = read("x.zip", resolution=8, num_classes=2)
    assert classes == [0, 0, 1, 1]
    for image, seed in zip(images, [2, 4, 3, 1], strict=True):
        expected = picture(seed).crop((5, 0, 35, 30)).resize((8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(image, np.asarray(expected).transpose(2, 0, 1))


def test_the_same_bytes_again_and_from_a_zip(work, run):
    source = saved(work / "mine", {f"{i % 3}/{i}.png": i for i in range(9)})
    with zipfile.ZipFile("mine.zip", "w") as file:
        for path in sorted(source.rglob("*.png"), reverse=True):
            file.write(path, f"mine/{path.relative_to(source)}")
    for out, images in {"a": source, "b": source, "c": "mine.zip"}.items():
        assert run("folder", "--source", images, "--resolution", 8, "--out", f"{out}.zip")[0] == 0
    assert len({(work / f"{name}.zip").read_bytes() for name in "abc"}) == 1


@pytest.mark.slow  # other processes import torch anew
def test_the_same_bytes_by_two_processes(work, run, monkeypatch):
    source = saved(work / "mine", {f"{i % 3}/{i}.png": i for i in range(9)})
    monkeypatch.setattr(prepare, "CHUNK", 2)
    for workers in (1, 2):
        words = ("--resolution", 8, "--out", f"{workers}.zip", "--workers", workers)
        assert run("folder", "--source", source, *words)[0] == 0
    assert (work / "1.zip").read_bytes() == (work / "2.zip").read_bytes()


def test_pngs_are_what_another_reader_reads(work):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 160, 150), dtype=np.uint8)
    for channels in (1, 3):
        found = np.asarray(Image.open(io.BytesIO(encode_png(pixels[:channels]))))
        assert np.array_equal(found.reshape(160, 150, channels), pixels[:channels].transpose(1, 2, 0))


def batch(folder: Path, name: str, images: np.ndarray, labels: list[int]) -> None:
    """A batch of CIFAR-10 as its authors' pickles are."""
    import pickle

    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({b"data": images.reshape(len(images), -1), b"labels": labels}, protocol=2))


@pytest.fixture
def cifar(work):
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 3, 32, 32), dtype=np.uint8)
    for i in range(5):
        batch(work / "batches", f"data_batch_{i + 1}", images[i], [i, 9])
    batch(work / "batches", "test_batch", images[5], [3, 4])
    return images


def test_cifar10(work, run, cifar):
    """Training images in the order of the batches, as EDM has them; the test images are for the floor."""
    status, out, _ = run("cifar10", "--source", "batches")
    assert status == 0 and "data/cifar10-32x32.zip: 10 images of 32x32, 10 classes" in out
    assert "the official set has 50,000 images" in out and "experiment=cifar10_base data=archive" in out
    images, labels = read("data/cifar10-32x32.zip", num_classes=10)
    assert np.array_equal(images, cifar[:5].reshape(10, 3, 32, 32)) and labels == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    status, out, _ = run("cifar10", "--source", "batches", "--split", "test", "--no-labels")
    assert "data.floor=data/cifar10-test-32x32.zip" in out
    images, labels = read("data/cifar10-test-32x32.zip")
    assert np.array_equal(images, cifar[5]) and labels is None
    both = Archive("data/cifar10-32x32.zip", floor="data/cifar10-test-32x32.zip")
    assert (len(both.split("train")), len(both.split("floor"))) == (10, 2)


def test_an_archive_with_a_wrong_checksum_is_refused(work, run, cifar):
    (work / "cifar-10-python.tar.gz").write_bytes(b"not it")
    line = refused(run, "cifar10", "--source", "cifar-10-python.tar.gz")
    found = hashlib.md5(b"not it").hexdigest()
    assert f"its MD5 is {found}, the original's c58f30108f718f92721af3b95e74349a" in line and "--any-checksum" in line


@pytest.mark.parametrize("trouble", [urllib.error.URLError("no route"), TimeoutError("slow"), ConnectionResetError("cut")])
def test_without_a_network_the_file_is_asked_for(work, run, monkeypatch, trouble):
    def offline(*_, **__):
        raise trouble

    monkeypatch.setattr(prepare.urllib.request, "urlopen", offline)
    line = refused(run, "cifar10")
    assert "cannot be fetched" in line and "put it at data/cifar-10-python.tar.gz" in line
    assert list((work / "data").iterdir()) == []


def test_what_is_fetched_is_kept_only_if_its_checksum_is_right(work, run, monkeypatch):
    class Answer(io.BytesIO):
        headers = {"Content-Length": "5"}  # noqa: RUF012

    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: Answer(b"wrong"))
    assert "its MD5 is" in refused(run, "cifar10") and list((work / "data").iterdir()) == []
    monkeypatch.setattr(prepare.cifar, "MD5", hashlib.md5(b"wrong").hexdigest())
    refused(run, "cifar10")  # the right checksum, but no archive
    assert (work / "data" / "cifar-10-python.tar.gz").read_bytes() == b"wrong"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("afhqv2", "fetch afhq_v2.zip, the data set's second version (no checksum is known) from https://github.com/clovaai/"),
        ("ffhq", "images1024x1024 or thumbnails128x128"),
        ("imagenet64", "https://image-net.org/download-images.php and put it at data/ILSVRC2012_img_train"),
    ],
)
def test_what_cannot_be_fetched_is_asked_for(work, run, what, said):
    assert said in refused(run, what)


def test_afhqv2_has_splits(work, run):
    names = {f"afhqv2/{split}/{kind}/{i}.png": i for split in ("train", "test") for i, kind in enumerate(("cat", "dog", "wild"))}
    saved(work / "data", {**names, "afhqv2/readme/x.png": 9})
    for split, count in {"all": 6, "train": 3, "test": 3}.items():
        status, out, _ = run("afhqv2", "--split", split)
        assert status == 0 and f": {count} images of 64x64, no classes" in out
    assert {path.name for path in (work / "data").glob("*.zip")} == {
        "afhqv2-64x64.zip",
        "afhqv2-train-64x64.zip",
        "afhqv2-test-64x64.zip",
    }


def test_ffhq_from_its_folders(work, run):
    saved(work / "data", {f"thumbnails128x128/0{i}000/0{i}001.png": i for i in range(2)})
    status, out, _ = run("ffhq")
    assert status == 0 and "data/ffhq-64x64.zip: 2 images of 64x64, no classes" in out and "experiment=ffhq_base" in out
    assert "--labels=ffhq: has none" in refused(run, "ffhq", "--labels", "--out", "x.zip")


def test_imagenets_folders_are_cropped_as_adm_does_it(work, run):
    saved(work / "train", {"n01440764/b.JPEG": 1, "n01440764/a.JPEG": 2, "n01443537/c.JPEG": 3, "other/d.JPEG": 4})
    status, out, _ = run("imagenet64", "--source", "train", "--resolution", 8)
    assert status == 0 and "data/imagenet-8x8.zip: 3 images of 8x8, 2 classes" in out
    images, labels = read("data/imagenet-8x8.zip", resolution=8, num_classes=2)
    assert labels == [0, 0, 1]
    expected = centre_crop_dhariwal(Image.open("train/n01440764/a.JPEG"), "RGB", 8)
    assert np.array_equal(images[0], np.asarray(expected).transpose(2, 0, 1))


def test_adms_crop_halves_by_boxes_first():
    """A constant stays, and 4 x 4 blocks of one colour come out exact at a quarter of the size."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))
    assert np.array_equal(np.asarray(TRANSFORMS["center-crop-dhariwal"](large, "RGB", 8)), blocks)
    assert TRANSFORMS["center-crop-dhariwal"](picture(0, 100, 37), "RGB", 16).size == (16, 16)


def test_downsampled_imagenet(work, run):
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 64, 64), dtype=np.uint8)
    for part, numbers in {"Imagenet64_train_part1_npz.zip": [1, 10], "Imagenet64_train_part2_npz.zip": [2]}.items():
        (work / "data").mkdir(exist_ok=True)
        with zipfile.ZipFile(work / "data" / part, "w") as file:
            for i in numbers:
                held = io.BytesIO()
                np.savez(held, data=images[i % 8].reshape(2, -1), labels=np.array([i, 1000]))
                file.writestr(f"train_data_batch_{i}.npz", held.getvalue()) if i != 10 else None
    status, out, _ = run("imagenet64")
    assert status == 0 and "4 images of 64x64, 1000 classes" in out and "classes are numbered as the downsampled" in out
    found, labels = read("data/imagenet-64x64.zip", resolution=64, num_classes=1000)
    assert labels == [0, 999, 1, 999] and np.array_equal(found, images[1:3].reshape(4, 3, 64, 64))


def test_a_downsampled_batch_that_is_none_is_one_line(work, run):
    np.savez("train_data_batch_1.npz", data=np.zeros((2, 12288), np.uint8), labels=np.array([0, 1]))
    Path("a").mkdir()
    Path("train_data_batch_1.npz").rename("a/train_data_batch_1.npz")
    assert "labels must be whole numbers from 1 to 1000" in refused(run, "imagenet64", "--source", "a")
    np.savez("a/train_data_batch_1.npz", data=np.zeros((2, 3072), np.uint8), labels=np.array([1, 2]))
    assert "must be bytes of shape (n, 12288)" in refused(run, "imagenet64", "--source", "a")
    np.savez("a/train_data_batch_1.npz", data=np.zeros((2, 12288), object), labels=np.array([1, 2]))
    assert "not a readable batch of arrays" in refused(run, "imagenet64", "--source", "a")
    assert list(Path("data").iterdir()) == []


BAD = {
    "no such file or folder": ["folder", "--source", "nowhere", "--resolution", 8],
    "--source=None: must name": ["folder", "--resolution", 8],
    "--resolution=None: must be given": ["folder", "--source", "mine"],
    "--resolution=16: CIFAR-10 has 32": ["cifar10", "--source", "mine", "--resolution", 16],
    "--split=test: the splits of ffhq: all": ["ffhq", "--split", "test"],
    "--channels=1: ffhq is RGB": ["ffhq", "--channels", 1],
    "holds no image": ["folder", "--source", "empty", "--resolution", 8],
    "lies in none of the sub-folders": ["folder", "--source", "stray", "--resolution", 8, "--labels"],
    "--out=no/x.zip: its folder does not exist": ["folder", "--source", "mine", "--resolution", 8, "--out", "no/x.zip"],
    "--out=there.zip: is there already": ["folder", "--source", "mine", "--resolution", 8, "--out", "there.zip"],
    "--workers=0": ["folder", "--source", "mine", "--resolution", 8, "--workers", 0],
    "invalid choice: 'mnist'": ["mnist"],
    "mine/cat/broken.png: not a readable image": ["folder", "--source", "broken", "--resolution", 8],
}


@pytest.mark.parametrize("said", BAD)
def test_mistakes_are_one_line_and_leave_nothing(work, run, said):
    saved(work / "mine", ANIMALS)
    saved(work / "stray", {**ANIMALS, "x.png": 1})
    saved(work / "broken" / "mine", ANIMALS)
    broken = work / "broken" / "mine" / "cat" / "broken.png"
    broken.write_bytes((work / "mine" / "cat" / "a.png").read_bytes()[:200])
    (work / "empty").mkdir()
    (work / "there.zip").touch()
    assert said in refused(run, *BAD[said])
    assert not list(work.glob("data/*")) and not list(work.glob(".*"))


def test_an_image_beyond_the_bound_is_refused_before_it_is_decoded(work, run, monkeypatch):
    from reflow_lab.data import folder

    saved(work / "mine", ANIMALS)
    monkeypatch.setattr(folder, "MAX_PIXELS", 1000)
    line = refused(run, "folder", "--source", "mine", "--resolution", 8, "--workers", 1)
    assert "cat/a.png" in line and "40x30, at most 1,000 pixels are read" in line


def test_killed_it_leaves_no_zip_and_goes_well_afterwards(work):
    """Nothing is at the target until all is; what a killed process left is removed by the next."""
    saved(work / "mine", {f"{i}.png": i % 7 for i in range(1000)})
    words = [sys.executable, "-m", "reflow_lab.cli", "data", "folder", "--source", "mine", "--resolution", "32", "--workers", "1"]
    started = subprocess.Popen([*words, "--out", "x.zip"], stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(work.glob(".x.zip.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (work / "x.zip").exists() and len(list(work.glob(".x.zip.*.tmp"))) == 1
    assert main([*words[3:], "--out", "x.zip"]) == 0
    assert sorted(path.name for path in work.iterdir()) == ["mine", "x.zip"]
    assert len(read("x.zip", resolution=32)[0]) == 1000
