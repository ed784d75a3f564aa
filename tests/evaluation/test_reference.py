import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from reflow_lab.data.sets import ImageSet
from reflow_lab.errors import UserError
from reflow_lab.evaluation import reference
from reflow_lab.evaluation.frechet import Moments, Reference
from reflow_lab.evaluation.reference import Statistics


class Corners:
    """Features that cost nothing: some pixels."""

    name, weight_hash, num_features = "corners", "abc", 6

    def __init__(self, places: int = 2) -> None:
        self.places, self.seen = places, 0

    @property
    def settings(self) -> dict[str, int]:
        return {"places": self.places}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images[:, :, 0, :2].flatten(1).float()


@pytest.fixture
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, None, "random")


def test_statistics_are_made_once_for_a_data_set_and_a_network(tmp_path: Path, images: ImageSet) -> None:
    network = Corners()
    found = reference.cached(tmp_path, images, network, 50)
    moments = Moments.of(network(images.take(np.arange(600))[0]))
    torch.testing.assert_close(found.statistics, Statistics(moments.mean, moments.cov), rtol=1e-9, atol=1e-9)
    assert network.seen == 1200
    again = reference.cached(tmp_path, images, network, 50)
    assert network.seen == 1200 and again.key == found.key and torch.equal(again.features, found.features)
    reference.cached(tmp_path, images, Corners(3), 50)
    other = ImageSet(images.images.flip(0), None, "random")
    reference.cached(tmp_path, other, network, 50)
    assert network.seen == 1800 and len(list((tmp_path / "reference").iterdir())) == 3


def test_kept_features_are_a_sample_that_grows(tmp_path: Path, images: ImageSet) -> None:
    few, more = (reference.cached(tmp_path, images, Corners(), num).features for num in (50, 700))
    assert len(more) == 600 and torch.equal(few, more[:50])
    whole = Corners()(images.take(np.arange(600))[0])
    assert not torch.equal(more, whole) and torch.equal(more.sort(0).values, whole.sort(0).values)


def test_edms_files_are_written_and_read(tmp_path: Path, images: ImageSet) -> None:
    found = reference.cached(tmp_path, images, Corners()).statistics
    reference.write_npz(tmp_path / "edm.npz", found)
    with np.load(tmp_path / "edm.npz") as file:
        assert set(file) == {"mu", "sigma"} and file["sigma"].dtype == np.float64
    read = reference.read(tmp_path / "edm.npz")
    assert torch.equal(read.mean, found.mean) and torch.equal(read.cov, found.cov)
    features = Corners()(images.take(np.arange(100))[0])
    given, own = Reference.given(*read), Reference.of(Moments.of(Corners()(images.take(np.arange(600))[0])))
    assert given.distance(features) == pytest.approx(own.distance(features), rel=1e-9)


def test_edm2s_files_have_several_features(tmp_path: Path) -> None:
    about = {"mu": np.arange(2.0), "sigma": np.eye(2)}
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"fid": about, "fd_dinov2": {"mu": np.zeros(3), "sigma": np.asfortranarray(np.eye(3))}}))
    assert reference.read(path).mean.tolist() == [0, 1] and reference.read(path, "fd_dinov2").cov.shape == (3, 3)
    with pytest.raises(UserError, match="mu and sigma of kid are wanted"):
        reference.read(path, "kid")


BAD = {
    "no such file": None,
    "arrays mu and sigma are wanted": {"mean": np.zeros(2)},
    r"mu has shape \(2,\) and sigma \(3, 3\)": {"mu": np.zeros(2), "sigma": np.eye(3)},
    "nan or inf": {"mu": np.array([0, np.nan]), "sigma": np.eye(2)},
    "not symmetric": {"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])},
    "not a whole .npz": {"mu": np.array([None, 1]), "sigma": np.eye(2)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_is_no_statistics_is_one_line(tmp_path: Path, message: str) -> None:
    path = tmp_path / "statistics.npz"
    if BAD[message] is not None:
        np.savez(path, **BAD[message])
    with pytest.raises(UserError, match=f"{path}: .*{message}") as caught:
        reference.read(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    path = tmp_path / "harmful.pkl"
    path.write_bytes(pickle.dumps({"fid": Harm(tmp_path / "harmed")}))
    with pytest.raises(UserError):
        reference.read(path)
    assert not (tmp_path / "harmed").exists()


class Harm:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)
