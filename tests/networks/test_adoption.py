"""Staged adoption from end to end: an imported network of EDM's, one's own images, and the study that ships."""

import json
import re
from pathlib import Path

import edm_format
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from reflow_lab import cli
from reflow_lab.networks import files
from reflow_lab.studies.description import find

ROWS = ["native sampler", "INF alone", "INF searched", "+LRN", "+DYN"]
SMALL = [
    *["debug=tiny", "trainer=cpu", "precision=32-true", "training.lr=1e-4", "pairs.num_forward=64", "training.total_kimg=0.32"],
    *["evaluation.num_images=50", "evaluation.search.num_images=50", "evaluation.features.resolution=32"],
    *["evaluation.straightness.num_images=4", "evaluation.straightness.nfe=3", "evaluation.search.num_trials=4"],
]


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """The words of a study on a conditional network in EDM's format, and a folder of images of its size and classes."""
    monkeypatch.chdir(tmp_path)
    case = edm_format.original("edm")[0]["adm_labels"]
    Path("net.pkl").write_bytes(edm_format.dumps({"ema": edm_format.network(case)}))
    size, classes = case["kwargs"]["img_resolution"], case["kwargs"]["label_dim"]
    for i in range(180):
        path = Path("images") / f"{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3), np.uint8)).save(path)
    assert cli.main(["import", "net.pkl", "--out", "imported.safetensors"]) == 0
    data = [
        "data=folder",
        "data.path=images",
        f"data.resolution={size}",
        f"data.num_classes={classes}",
        "data.train_fraction=0.6",
    ]
    study = yaml.safe_load(find("adoption").read_text())
    Path("experiments").mkdir()
    Path("experiments/adoption.yaml").write_text(yaml.safe_dump(study | {"nfe": [2]}))  # one of its three, for speed
    return ["study=adoption", "teacher=run", "teacher.path=imported.safetensors", *data, *SMALL]


@pytest.mark.slow
def test_the_study_takes_an_imported_network(imported):
    assert cli.main(["study", *imported]) == 0
    cells, page = json.loads(Path("outputs/adoption/table.json").read_text()), Path("outputs/adoption/table.md").read_text()
    assert [cell["name"] for cell in cells] == ROWS
    theirs = files.describe(Path("imported.safetensors"))
    for cell in cells:
        about = files.describe(files.find(cell["run"]))
        assert about["net"] == theirs["net"] and about["num_classes"] == theirs["num_classes"] == 5
        assert cell["peak_memory_mb"] > 0 and cell["ms_per_image"] > 0
        assert (cell["training"]["seconds"] > 0) == (cell["training"]["kimg"] > 0) == (cell["name"] in ROWS[3:])
    assert len({cell["run"] for cell in cells[:3]}) == 1
    assert_equal_weights(files.find(cells[0]["run"]), Path("imported.safetensors"))
    assert "| native sampler | HeunSigma on EDM(rho=7.0, sigma_min=0.002) |" in page
    assert "| INF alone | DPM(r=0.4) on Sigmoid(kappa=10.0) |" in page
    assert re.search(r"\| INF searched against INF alone \| [+-]\d", page)
    searched = [json.loads(path.read_text()) for path in Path("outputs/sampler").glob("*/search.json")]
    assert [len(found["trials"]) for found in searched] == [4] * 3  # of three models


def assert_equal_weights(path, other):
    for a, b in zip(files.load(path).state_dict().values(), files.load(other).state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_data_of_other_classes_are_refused_before_any_work(imported, capsys):
    assert cli.main(["study", *imported, "data.num_classes=0"]) == 2
    line = "teacher.path=imported.safetensors: takes 5 classes, but the data has 0"
    assert capsys.readouterr().err.splitlines()[-1] == f"reflow-lab: {line}" and not Path("outputs").exists()
