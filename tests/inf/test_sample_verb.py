import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from reflow_lab import api
from reflow_lab.data.sets import to_uint8
from reflow_lab.errors import UserError
from reflow_lab.inf.grids import Uniform
from reflow_lab.inf.sample import picture, sample
from reflow_lab.inf.solvers import Euler
from reflow_lab.networks import files


@pytest.fixture
def draw(images, tmp_path):
    """Run the verb on the images' teacher."""
    run = f"run={images.teacher}"
    return lambda *more: sample(images.config("sample", run, "num_images=5", "nfe=2", f"out={tmp_path}/a/grid.png", *more))


def test_a_grid_as_png(draw, capsys):
    out = draw()
    with Image.open(out) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "L", (3 * 32, 2 * 32))
        assert not np.asarray(image)[32:, 64:].any()  # five of six places
    assert capsys.readouterr().out.endswith(f"5 samples: {out}\n")


def test_an_array_holds_what_python_draws(draw, images, tmp_path):
    out = draw(f"out={tmp_path}/all.npz", "seed=3", "inf/solver=euler", "inf/grid=uniform", "t_max=0.9")
    with np.load(out, allow_pickle=False) as file:
        found = torch.from_numpy(file["samples"])
    expected = api.sample(api.load(images.teacher), 5, 2, 3, solver=Euler(), grid=Uniform(), t_max=0.9)
    assert found.dtype == torch.uint8 and found.shape == (5, 32, 32, 1)
    assert torch.equal(found.permute(0, 3, 1, 2), to_uint8(expected))


def test_the_chosen_profile_and_precision_are_used(toy, tmp_path):
    def points(*more):
        words = [f"run={toy.teacher}", "num_images=50", f"out={tmp_path}/points.npz", *more]
        with np.load(sample(toy.config("sample", *words)), allow_pickle=False) as file:
            return file["samples"]

    average, raw = points(), points("profile=raw")
    assert average.shape == (50, 2) and average.dtype == np.float32
    assert np.array_equal(average, points("profile=ema0.1"))
    assert 1e-4 < abs(average - raw).max() < 1
    assert 1e-5 < abs(average - points("precision=bf16-mixed")).max() < 0.3


def test_the_layout_of_a_picture():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 2, 4)
    found = np.asarray(picture(images, columns=3))
    assert found.shape == (4, 12, 3)
    assert found[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert picture(images[:5]).size == (12, 4) and picture(images[:1]).size == (4, 2)


def test_pixels_stay_in_their_place():
    image = torch.randint(0, 256, (1, 3, 5, 7), dtype=torch.uint8)
    assert np.array_equal(np.asarray(picture(image)), image[0].permute(1, 2, 0).numpy())


MISTAKES = {
    "out=grid.jpg": "out=grid.jpg: must end in .png",
    "out=null": "out=None: must end in .png",
    "num_images=0": "num_images=0: must be a whole number of at least 1",
    "num_images=many": "num_images=many: must be a whole number",
    "nfe=0": "nfe=0: must be",
    "t_max=0": "t_max=0: must lie in",
    "run=null": "run=null: give a run folder",
    "profile=ema7": "profile=ema7: allowed: raw",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(draw, no_network, mistake):
    with pytest.raises(UserError) as caught:
        draw(mistake)
    assert str(caught.value).startswith(MISTAKES[mistake]) and "\n" not in str(caught.value)


def test_points_are_no_picture(toy, no_network, tmp_path):
    with pytest.raises(UserError, match="points are no picture"):
        sample(toy.config("sample", f"run={toy.teacher}", f"out={tmp_path}/grid.png"))


def test_nan_is_no_picture(images, tmp_path):
    with safe_open(files.find(images.teacher), "pt") as file:
        state, metadata = {name: file.get_tensor(name) * torch.nan for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(state, tmp_path / "nan.safetensors", metadata)
    with pytest.raises(UserError, match="made NaN or infinite samples"):
        sample(images.config("sample", f"run={tmp_path}/nan.safetensors", "nfe=1", f"out={tmp_path}/grid.png"))
    assert not (tmp_path / "grid.png").exists()
