"""What is measured of each sample, on the disk: by processes side by side, by killed ones, and read a chunk at a time."""

import multiprocessing
import time

import numpy as np
import pytest
import torch

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.evaluation import evaluate, vectors
from reflow_lab.evaluation.frechet import Moments, Reference

processes = multiprocessing.get_context("forkserver")
CPU = torch.device("cpu")
TIMED = ("ms_per_image", "folder")


def rows(indices):
    """(i, 1/(i+1), i^2), forty at a time."""
    for chunk in np.split(indices, range(40, len(indices), 40)):
        i = torch.from_numpy(chunk).float()
        yield torch.stack([i, 1 / (i + 1), i**2], dim=1)


@pytest.fixture
def held(tmp_path):
    """2,500 rows in three shards."""
    return vectors.fill(vectors.plan(tmp_path, 2500, 3, 40, of="test"), rows, CPU, "test")


def test_rows_are_read_in_order_and_columns_are_cut_from_them(held):
    whole = torch.cat(list(rows(np.arange(2500))))
    assert len(list(held.store.folder.glob("shard-*.npy"))) == 3
    assert held.shape == (2500, 3) and torch.equal(held.all(), whole)
    assert torch.equal(held.take(np.array([2000, 3, 999])), whole[[2000, 3, 999]])
    part = held.columns(1, 3)
    assert (
        part.shape == (2500, 2) and torch.equal(part.all(), whole[:, 1:]) and torch.equal(part.columns(1, 2).all(), whole[:, 2:])
    )
    assert max(map(len, held)) == vectors.CHUNK  # no more is in memory at a time


def test_a_distance_of_rows_on_the_disk_is_that_of_a_tensor(held):
    """Statistics in other chunks agree to 1e-9."""
    part, reference = held.columns(0, 2), Reference.of(torch.randn(500, 2))
    here, there = Moments.of(part), Moments.of(part.all())
    torch.testing.assert_close(here.outer, there.outer, rtol=1e-12, atol=0)
    here, there = reference.linearise(part), reference.linearise(part.all())
    assert here.distance == pytest.approx(there.distance, rel=1e-9)
    torch.testing.assert_close(here.influence, there.influence, rtol=1e-9, atol=1e-9)


def test_rows_with_nan_are_not_kept(tmp_path):
    made = vectors.plan(tmp_path, 10, 3, 40, of="nan")
    with pytest.raises(UserError, match="NaN or infinite values among samples 0 to 9"):
        vectors.fill(made, lambda indices: (row / 0 for row in rows(indices)), CPU, "test")
    assert not made.is_done()


def test_rows_are_removed_by_the_last_to_leave(tmp_path):
    made = vectors.plan(tmp_path, 10, 3, 40, of="passing")
    vectors.fill(made, rows, CPU, "test")
    with vectors.passing(made, use := tmp_path / "use"):
        with vectors.passing(made, use):
            pass
        assert made.is_done()
        with pytest.raises(ZeroDivisionError), vectors.passing(made, use):
            1 / 0  # noqa: B018
    assert not made.folder.exists()
    vectors.fill(made, rows, CPU, "test")
    with pytest.raises(ZeroDivisionError), vectors.passing(made, use):
        1 / 0  # noqa: B018
    assert made.is_done()  # a cell that was interrupted goes on from there


def cell(cfg, log=None, pause=0.0):
    """Measure a cell, slowly if asked; `log` takes a line a batch."""
    torch.set_num_threads(1)
    exact = evaluate.from_noise

    def slowly(*args):
        time.sleep(pause)
        if log:
            with log.open("a") as file:
                file.write("batch\n")
        return exact(*args)

    evaluate.from_noise = slowly
    try:
        run = parts.described(parts.files.find(cfg.run), parts.data_source(cfg), "run")
        found = evaluate.measured(cfg, run)
    finally:
        evaluate.from_noise = exact
    return {name: value for name, value in found.items() if name not in TIMED}


@pytest.fixture
def configured(toy, tmp_path):
    """A cell of 2,000 samples in three shards, in outputs of its own by name."""

    def make(name):
        more = ("evaluation.num_images=2000", "nfe=2", f"t_max={80 / 81}", "evaluation.metrics=[kid]")
        return toy.config("evaluate", f"run={toy.teacher}", *more, f"outputs={tmp_path / name}")

    return make


def drawn(outputs):
    """The rows of cells that are there."""
    recipes = outputs.glob("vectors/*/recipe.json")
    return [recipe.parent for recipe in recipes if '"cell"' in recipe.read_text()]


def test_several_processes_measure_a_cell_together(configured, tmp_path):
    """The metrics are those of one process alone, both took part, and the rows are gone."""
    alone, logs = cell(configured("alone"), tmp_path / "alone.log"), [tmp_path / name for name in ("a.log", "b.log")]
    both = [processes.Process(target=cell, args=(configured("both"), log, 0.03)) for log in logs]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    shares = [len(log.read_text().split()) for log in logs]
    assert min(shares) > 10 and sum(shares) < 2 * len((tmp_path / "alone.log").read_text().split())
    again = cell(configured("both"), again_log := tmp_path / "again.log")
    assert again == alone and not again_log.exists()
    assert not drawn(tmp_path / "both")


def test_a_killed_evaluation_goes_on_where_it_stopped(configured, tmp_path):
    alone, log = cell(configured("alone"), tmp_path / "alone.log"), tmp_path / "killed.log"
    process = processes.Process(target=cell, args=(configured("killed"), log, 0.03))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(list(made.glob(".shard*.sha256")) for made in drawn(tmp_path / "killed")):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert cell(configured("killed"), tmp_path / "rest.log") == alone
    assert len((tmp_path / "rest.log").read_text().split()) < len((tmp_path / "alone.log").read_text().split())
