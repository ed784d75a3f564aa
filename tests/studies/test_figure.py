import numpy as np
import pytest
from PIL import Image

from reflow_lab.studies.description import Row, Study
from reflow_lab.studies.figure import NUM_COLUMNS, draw_samples

STUDY = Study("t", (), (1, 2, 4), (Row("base flow", ()), Row("BSL", ())))


def make_cells(folder, samples):
    cells = []
    for i, row in enumerate(STUDY.rows):
        for nfe in STUDY.nfe:
            path = folder / f"{i}{nfe}"
            path.mkdir()
            np.save(path / "samples.npy", samples(i, nfe))
            cells.append({"name": row.name, "protocol": {"nfe": nfe}, "seed": 0, "folder": str(path)})
    return cells


def read(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def panels(pixels):
    """Rows and columns of panels, by the runs of rows and columns of pixels that hold the mark's colour."""
    marked = (abs(pixels - 200) < 3).all(-1)
    return tuple(int((np.diff((marked.mean(axis) > 0.2).astype(int), prepend=0) == 1).sum()) for axis in (1, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_for_each_row_and_number_of_steps(tmp_path, channels):
    cells = make_cells(tmp_path, lambda i, nfe: np.full((16, channels, 8, 8), 200, np.uint8))
    draw_samples(tmp_path / "samples.png", STUDY, cells)
    assert panels(read(tmp_path / "samples.png")) == (len(STUDY.rows), len(STUDY.nfe))


def test_a_strip_shows_the_first_images_in_order(tmp_path):
    def samples(i, nfe):
        return np.stack([np.full((1, 8, 8), 20 + 20 * min(j, NUM_COLUMNS), np.uint8) for j in range(16)])

    draw_samples(tmp_path / "samples.png", STUDY, make_cells(tmp_path, samples))
    pixels = read(tmp_path / "samples.png")[:, :, 0]
    line = next(row for row in pixels if (row == 20 * NUM_COLUMNS).sum() > 10)
    levels = [int(v) for v, before in zip(line[1:], line[:-1], strict=True) if v != before and v % 20 == 0]
    assert levels[:NUM_COLUMNS] == [20 + 20 * j for j in range(NUM_COLUMNS)] and 20 + 20 * NUM_COLUMNS not in levels


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_points_are_scattered(tmp_path, dim):
    draw_samples(
        tmp_path / "samples.png", STUDY, make_cells(tmp_path, lambda i, nfe: np.random.default_rng(i).normal(size=(50, dim)))
    )
    pixels = read(tmp_path / "samples.png")
    assert ((pixels[:, :, 2] - pixels[:, :, 0]) > 60).sum() > 100  # blue dots


def test_colours_are_kept(tmp_path):
    red = np.zeros((8, 3, 8, 8), np.uint8)
    red[:, 0] = 255
    draw_samples(tmp_path / "samples.png", STUDY, make_cells(tmp_path, lambda i, nfe: red))
    pixels = read(tmp_path / "samples.png")
    assert (pixels == [255, 0, 0]).all(-1).mean() > 0.2
