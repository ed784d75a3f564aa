import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab.data.folder import Folder, image_files, read_image
from reflow_lab.errors import UserError


def noise_image(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    for seed in range(10):
        folder = tmp_path / "photos" / ("cat", "ant", "bee")[seed % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(folder / f"{seed}.png")
    return tmp_path / "photos"


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_images_of_the_right_size_are_kept_byte_for_byte(photos):
    source = Folder(str(photos), resolution=8)
    pixels = {np.asarray(noise_image(seed)).transpose(2, 0, 1).tobytes() for seed in range(10)}
    assert rows(source.split("train").images) | rows(source.split("floor").images) == pixels


def test_splits_are_disjoint_and_reference_is_train(photos):
    source = Folder(str(photos), resolution=8, train_fraction=0.75)
    train, floor = source.split("train"), source.split("floor")
    assert (len(train), len(floor)) == (7, 3) and not rows(train.images) & rows(floor.images)
    assert source.split("reference") is train and train.labels is None


def test_content_does_not_depend_on_where_the_folder_lies(photos):
    before = Folder(str(photos), resolution=8).split("train").content_hash
    moved = photos.rename(photos.parent / "moved")
    assert Folder(str(moved), resolution=8).split("train").content_hash == before


def test_labels_are_the_sorted_sub_folders(photos):
    source = Folder(str(photos), resolution=8, num_classes=3)
    label_of = {np.asarray(noise_image(s)).transpose(2, 0, 1).tobytes(): (2, 0, 1)[s % 3] for s in range(10)}
    for held in (source.split("train"), source.split("floor")):
        assert [label_of[image.numpy().tobytes()] for image in held.images] == held.labels.tolist()


def test_wrong_number_of_classes(photos):
    with pytest.raises(UserError, match=r"^data\.num_classes=2: \S+ has 3 sub-folders with images$"):
        Folder(str(photos), num_classes=2).split("train")


def test_image_outside_the_classes(photos):
    noise_image(0).save(photos / "stray.png")
    with pytest.raises(UserError, match=r"^data\.path=\S+stray\.png: lies in none of the sub-folders"):
        Folder(str(photos), num_classes=3).split("train")


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp"])
def test_kinds_of_files(tmp_path, suffix):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / f"x.{suffix}", quality=100)
    pixels = read_image(image_files(tmp_path)[0], 4, 3)
    assert pixels.shape == (3, 4, 4) and np.abs(pixels[:, 0, 0].astype(int) - [200, 100, 50]).max() <= 3


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 90 * 256 + 200, (90, 90, 90)),
    ],
)
def test_modes_are_converted(tmp_path, mode, color, rgb):
    file = tmp_path / "x.png"
    Image.new(mode, (6, 6), color).save(file)
    assert read_image(file, 6, 3)[:, 3, 3].tolist() == list(rgb)


def test_transparent_palette_is_laid_on_white(tmp_path):
    file = tmp_path / "x.png"
    Image.new("P", (6, 6), 0).save(file, transparency=0)
    assert read_image(file, 6, 3).min() == 255


def test_grey_is_the_luma(tmp_path):
    Image.new("RGB", (6, 6), (255, 0, 0)).save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png", 6, 1)
    assert pixels.shape == (1, 6, 6) and pixels[0, 0, 0] == 76


@pytest.mark.parametrize("size", [(20, 8), (8, 20)])
def test_the_centre_is_cropped(tmp_path, size):
    image = Image.new("L", size, 255)
    left, top = (size[0] - 8) // 2, (size[1] - 8) // 2
    image.paste(0, (left, top, left + 8, top + 8))
    image.save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 4, 1).max() == 0


def test_resizing_is_lanczos(tmp_path):
    image = noise_image(3, (30, 30))
    image.save(tmp_path / "x.png")
    oracle = np.asarray(image.resize((10, 10), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "x.png", 10, 3), oracle)


def test_orientation_mark_is_obeyed(tmp_path):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png", 8, 1)[0, :, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("kept", [0, 20, 100])
def test_corrupt_image_is_named(photos, kept):
    file = photos / "bee" / "5.png"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"^data\.path=\S+bee/5\.png: not a readable image [^\n]+$"):
        Folder(str(photos)).split("train")


def test_hidden_and_other_files_are_passed_over(photos):
    (photos / "notes.txt").write_text("no image")
    (photos / "bee" / "._5.png").write_bytes(b"a file manager's shadow")
    (photos / ".thumbs").mkdir()
    noise_image(1).save(photos / ".thumbs" / "1.png")
    assert len(image_files(photos)) == 10


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"^data\.path=\S+none: no such folder"):
        Folder(str(tmp_path / "none")).split("train")
    with pytest.raises(UserError, match=r"holds no image; wanted are files ending in \.png"):
        Folder(str(tmp_path)).split("train")
    with pytest.raises(UserError, match=r"^data\.path=null: must name the folder"):
        Folder(None).split("train")


def test_a_single_image_is_too_few(tmp_path):
    noise_image(0).save(tmp_path / "only.png")
    with pytest.raises(UserError, match=r"1 images cannot be split into 0\.8 and the rest"):
        Folder(str(tmp_path)).split("train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", 0),
        ("resolution", 1.5),
        ("channels", 4),
        ("num_classes", -1),
        ("train_fraction", 1),
        ("train_fraction", "x"),
    ],
)
def test_impossible_arguments_are_refused(key, value):
    with pytest.raises(UserError, match=f"^data.{key}={value}: [^\n]+$"):
        Folder("x", **{key: value})
