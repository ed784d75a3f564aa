import json

import numpy as np
import pytest
import torch

from reflow_lab import parts
from reflow_lab.lrn.store import pair_noise
from reflow_lab.networks import files
from reflow_lab.studies import traces
from reflow_lab.training.train import train
from tiny import UNTRAINED

SHORT = ["dyn=baseline", "lrn=baseline", "inf=baseline", "t_max=0.9"]


def written(out, rows):
    traces.write(out, rows)
    text = (out / "traces.json").read_text()
    assert len(text) < 15_000 * len(rows)
    return json.loads(text)["rows"]


@pytest.fixture(scope="module")
def taught(toy, tmp_path_factory):
    """The teacher and a ReFlow of it: (configuration, run folder) by row."""
    words = [*SHORT, f"outputs={tmp_path_factory.mktemp('traces')}", "seed=3"]
    rows = {}
    for name, kimg in {"base flow": 0, "BSL": 80}.items():
        cfg = toy.config(
            "train", *words, f"training.total_kimg={kimg}", "training.batch_size=256", "pairs.num_backward=1600", "pairs.nfe=35"
        )
        rows[name] = cfg, train(cfg)
    return rows


def test_paths_of_points(toy, taught, tmp_path):
    found = written(tmp_path, taught)
    cfg, folder = taught["BSL"]
    velocity = files.load(files.find(folder)).eval()
    x = 0.9 * pair_noise(cfg.evaluation.seed, np.arange(20), (2,))
    assert found["BSL"]["paths"]["kind"] == "points" and found["BSL"]["paths"]["t"][::16] == [0.9, 0.45, 0]
    with torch.no_grad():
        for step in range(33):  # Euler's rule, written out
            here = [[path[step] for path in found["BSL"]["paths"][name]] for name in "xy"]
            torch.testing.assert_close(torch.tensor(here).T, x, atol=1e-3, rtol=0)
            x = x - 0.9 / 32 * velocity(x, torch.full((20,), 0.9 * (1 - step / 32)))


def test_a_reflow_is_straighter_than_its_teacher(taught, tmp_path):
    found = written(tmp_path, taught)
    deviation = {name: np.mean(row["along_time"]["deviation"]["mean"]) for name, row in found.items()}
    assert 0 < deviation["BSL"] < 0.5 * deviation["base flow"]
    assert all(len(row["along_time"]["t"]) == 16 and row["along_time"]["num"] == 32 for row in found.values())
    assert all(min(row["along_time"]["acceleration"]["standard_error"]) > 0 for row in found.values())


def test_relative_loss_is_the_last_that_was_logged(taught, tmp_path):
    found = written(tmp_path, taught)
    assert found["base flow"]["relative_loss"] is None  # it was not trained
    loss = found["BSL"]["relative_loss"]
    assert loss["t"] == pytest.approx([(i + 0.5) / 8 for i in range(8)], abs=1e-3)
    assert np.mean(loss["mean"]) == pytest.approx(1, rel=1e-4)  # over the mean of all
    assert all(low < mean < high for low, mean, high in zip(loss["min"], loss["mean"], loss["max"], strict=True))
    lines = (taught["BSL"][1] / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if "relative_loss" in line][-1]
    assert loss["max"][0] == pytest.approx(last["by_time/t0.062/relative_loss_max"], rel=1e-5)


def test_what_is_done_calls_no_network(taught, tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(traces, "look", None)
    cfg, folder = taught["BSL"]
    assert written(tmp_path, {"BSL": (cfg, folder), "+INF": (cfg, folder)})["+INF"]["paths"]["kind"] == "points"


def test_paths_of_pixels(images, tmp_path):
    cfg = images.config("train", *SHORT, UNTRAINED, f"outputs={tmp_path}")
    run = parts.described(files.find(images.teacher), parts.data_source(cfg), "run")
    paths = traces.look(cfg, run)["paths"]
    noise = 0.9 * pair_noise(cfg.evaluation.seed, np.arange(3), (1, 32, 32))
    assert paths["kind"] == "pixels" and paths["place"][:2] == [[0, 11, 11], [0, 11, 20]] and len(paths["place"]) == 12
    assert [value[0] for value in paths["value"]] == pytest.approx(
        [noise[i, 0, y, x].item() for i, y, x in paths["place"]], abs=1e-4
    )
