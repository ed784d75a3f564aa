import math

import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab import parts
from reflow_lab.artifacts import read_json
from reflow_lab.data.fashion import FashionMNIST
from reflow_lab.data.sets import ImageSet, to_float, to_uint8
from reflow_lab.errors import UserError
from reflow_lab.evaluation import inspection
from reflow_lab.evaluation.features import Lite0Features
from reflow_lab.evaluation.frechet import Reference
from reflow_lab.evaluation.inspection import Subject, compare, inspect
from reflow_lab.flow import T_MAX
from reflow_lab.inf.grids import Sigmoid
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import DPM
from reflow_lab.networks import files

TINY = [
    "inspect.straightness.num_images=3",
    "inspect.straightness.num_bins=4",
    "inspect.straightness.per_bin=2",
    "inspect.copies.num_images=30",
    "inspect.copies.num_shown=3",
    "inspect.resolution=32",
    "inspect.batch_size=40",
    "inspect.steps.num_rows=2",
    "inspect.steps.nfe=[1,3]",
    "inspect.classes.num_images=20",
    "inspect.classes.least=10",
    "inspect.cost.batch_sizes=[1,2]",
    "inspect.cost.nfe=[1]",
    "inspect.cost.repeats=1",
    "nfe=1",
]


@pytest.fixture
def small(monkeypatch):
    """Only the first 80 training images."""
    split = FashionMNIST.split

    def first(self, name):
        found = split(self, name)
        return ImageSet(found.images[:80], found.labels[:80], name) if name == "train" else found

    monkeypatch.setattr(FashionMNIST, "split", first)


@pytest.fixture
def look(images, tmp_path, small):
    def run(*more, run=images.teacher):
        return inspect(images.config("inspect", f"run={run}", *TINY, f"outputs={tmp_path}", *more))

    return run


@pytest.fixture
def conditional(images, tmp_path):
    """Weights of an untrained flow of ten classes."""
    cfg = images.config("train", "net.network.num_classes=10")
    description = {"net": parts.plain(cfg.net), "shape": [1, 32, 32], "num_classes": 10, "t_max": T_MAX}
    network = parts.network(cfg)
    torch.nn.init.normal_(network.network.head.weight, std=0.05)
    files.save(network, tmp_path / "conditional.safetensors", description)
    return tmp_path / "conditional.safetensors"


PICTURES = {"straightness.png", "straightness.svg", "nearest.png", "nearest.svg", "neighbours.png", "steps.png"}


def test_a_folder_of_numbers_and_pictures_and_the_same_in_words(look, capsys, request):
    folder = look()
    said = capsys.readouterr().out
    assert {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")} == PICTURES
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
    for part in inspection.LOOKS:
        assert f"{part}:\n" in said
    assert "skipped: this flow is unconditional" in said and f"written: {folder}" in said
    assert "| batch 2 | " in said and (folder / "cost.md").read_text().startswith("Sampling on ")
    request.getfixturevalue("no_network")
    assert look() == folder
    assert capsys.readouterr().out == said


def test_what_was_interrupted_goes_on_where_it_was(look, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(inspection.LOOKS, "steps", inspection.LOOKS["steps"]._replace(find=stopped))
        look("inspect.parts=[straightness,steps]")
    monkeypatch.setitem(inspection.LOOKS, "straightness", inspection.LOOKS["straightness"]._replace(find=stopped))
    folder = look("inspect.parts=[straightness,steps]")
    assert {path.name for path in folder.glob("*.json")} >= {"straightness.json", "steps.json", "done.json"}


def test_copies_of_training_images_are_caught(look, monkeypatch, capsys):
    look("inspect.parts=[copies]")
    assert capsys.readouterr().out.count("no more than chance") == 2
    monkeypatch.setattr(Subject, "draw", lambda self, indices, label, nfe, what: self.split("train").images[indices])
    folder = look("inspect.parts=[copies]", "inspect.copies.num_images=31")
    out = capsys.readouterr().out
    by_chance = f"{1 / math.comb(62, 31):.2g}"  # that of 62 of one law the 31 samples come first
    assert out.count("100 % of 31 samples") == 2 and out.count(f"more than chance (p = {by_chance})") == 2
    found = np.load(folder / "copies.npz")
    for space in ("lite0", "pixels"):
        assert found[f"{space}_index"][:31].tolist() == list(range(31))
        assert found[f"{space}_distance"][:31].max() < 1e-3 < found[f"{space}_distance"][31:].min()


def test_without_held_out_images_there_is_no_verdict(look, monkeypatch, capsys):
    split = Subject.split
    empty = ImageSet(torch.empty(0, 1, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), "none")
    monkeypatch.setattr(Subject, "split", lambda self, name: empty if name == "floor" else split(self, name))
    folder = look("inspect.parts=[copies]")
    assert capsys.readouterr().out.count("no held-out images to compare with") == 2
    assert read_json(folder / "copies.json")["spaces"]["lite0"]["copies"] is None
    assert compare(torch.arange(4.0), 4)["median_held_out"] is None


def test_columns_of_the_grid_are_the_samplers_images(look, images, capsys):
    folder = look("inspect.parts=[steps]", "inspect.steps.nfe=[1,2,4]")
    found = read_json(folder / "steps.json")
    cfg = images.config("inspect", f"run={images.teacher}", *TINY, f"t_max={T_MAX}")
    run = parts.described(files.find(images.teacher), parts.data_source(cfg), "run")
    subject, indices = Subject(cfg, run, folder), np.arange(2)
    how = {"solver": DPM(), "grid": Sigmoid(), "t_max": T_MAX}
    made = {n: to_float(to_uint8(sample(run.velocity(cfg), subject.noise(indices), nfe=n, **how))) for n in (1, 2, 4)}
    expected = {str(n): (made[n] - made[4]).square().mean().sqrt().item() for n in (1, 2)}
    assert found["rmse_to_most"] == pytest.approx(expected, abs=1e-6) and found["most"] == 4
    assert "at 2" in capsys.readouterr().out


def test_distances_by_class_are_those_of_the_classes_images(look, conditional, images, capsys):
    only = "inspect.classes.only=[3,7]"
    folder = look("inspect.parts=[classes]", only, run=conditional)
    found = read_json(folder / "classes.json")["classes"]
    assert [(c["label"], c["num"]) for c in found] == [(3, 20), (7, 20)]
    cfg = images.config("inspect", f"run={conditional}", *TINY, f"t_max={T_MAX}")
    run = parts.described(conditional, parts.data_source(cfg), "run")
    reference = Subject(cfg, run, folder).split("reference")
    real = Lite0Features(resolution=32)(reference.images[reference.labels == 7][:20])
    made = Subject(cfg, run, folder).draw(7 * 20 + np.arange(20), torch.full((20,), 7), 1, "")
    assert found[1]["distance"] == pytest.approx(Reference.of(real).distance(Lite0Features(resolution=32)(made)), rel=1e-5)
    assert 0 < found[1]["floor"] < found[1]["distance"]
    assert "over 2 classes of 20 images, floor" in capsys.readouterr().out
    assert (folder / "classes.png").exists()


def test_a_class_of_few_real_images_has_no_distance(look, conditional, capsys):
    more = ("inspect.classes.num_images=400", "inspect.classes.least=300", "inspect.classes.only=[0]")
    folder = look("inspect.parts=[classes]", *more, run=conditional)
    assert read_json(folder / "classes.json")["classes"] == [{"label": 0, "num": 250, "distance": None, "floor": None}]
    assert "too few real images, n/a: 1 of 1 classes (0)" in capsys.readouterr().out
    assert not (folder / "classes.png").exists()


MISTAKES = {
    "inspect.parts=[beauty]": "inspect.parts=['beauty']: must be a list of some of straightness, copies, steps, classes, cost",
    "inspect.parts=[]": "inspect.parts=[]: must be",
    "inspect.copies.num_images=0": "inspect.copies.num_images=0: must be a whole number of at least 1",
    "inspect.resolution=16": "inspect.resolution=16: must be a whole number of at least 32",
    "inspect.steps.nfe=[1,1]": "inspect.steps.nfe=[1, 1]: must be a list of different whole numbers",
    "inspect.cost.batch_sizes=8": "inspect.cost.batch_sizes=8: must be a list",
    "inf.guidance.weight=1": "guidance=cfg: this flow is unconditional",
    "run=null": "run=null: give a run folder",
    "inf=auto": "inf=auto: take the sampler that evaluate inf=auto found",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(look, no_network, tmp_path, mistake):
    words = ["inf/guidance=cfg"] if "guidance" in mistake else []
    with pytest.raises(UserError) as caught:
        look(*words, mistake)
    assert MISTAKES[mistake] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "inspect").exists()


def test_classes_that_the_flow_does_not_know(look, conditional):
    with pytest.raises(UserError, match=r"^inspect\.classes\.only=\[10\]: .* 0\.\.9$"):
        look("inspect.classes.only=[10]", run=conditional)


def test_points_have_no_pictures(toy, tmp_path):
    with pytest.raises(UserError, match="makes points"):
        inspect(toy.config("inspect", f"run={toy.teacher}", f"outputs={tmp_path}"))


def test_the_device_is_part_of_what_names_a_folder_only_with_the_cost(images, monkeypatch):
    def key(*more):
        cfg = images.config("inspect", f"run={images.teacher}", *TINY, f"t_max={T_MAX}", *more)
        return inspection.plan(cfg, parts.described(files.find(images.teacher), parts.data_source(cfg), "run")).key

    before = key(), key("inspect.parts=[steps]")
    monkeypatch.setattr(parts, "device_name", lambda cfg: "another")
    after = key(), key("inspect.parts=[steps]")
    assert before[0] != after[0] and before[1] == after[1] != before[0]
