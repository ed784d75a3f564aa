import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reflow_lab import parts
from reflow_lab.artifacts import file_hash, read_json
from reflow_lab.cli import main
from reflow_lab.errors import UserError
from reflow_lab.evaluation import evaluate, targets
from reflow_lab.evaluation.features import WEIGHT_HASH
from reflow_lab.evaluation.values import Z95
from reflow_lab.gaussian import Gaussian
from reflow_lab.networks import files
from tiny import Lab, composed

AS_PAIRS = ["inf/solver=heun_sigma", "inf/grid=edm", "nfe=3"]  # conf/pairs/default.yaml, with the 3 calls of debug=tiny


@dataclass(frozen=True)
class Exact(parts.Teacher):
    """The closed-form velocity of the Gaussian toy in a teacher's place."""

    exact: Any = None

    def velocity(self, cfg):  # type: ignore[no-untyped-def]
        return self.exact


EXACT = Exact(Path("exact"), "exact", {"num_classes": 0, "t_max": 80 / 81}, Gaussian(0.0, 0.5))


T_MAX = f"t_max={80 / 81}"  # what `evaluate` takes from the run; the functions below it want a number


def gaussian_config(outputs: Path, *more: str):  # type: ignore[no-untyped-def]
    given = [
        "experiment=toy",
        "data=gaussian",
        "data.num_points=4000",
        "teacher=none",
        "trainer=cpu",
        "evaluation.num_images=4000",
        T_MAX,
    ]
    return composed("evaluate", *given, f"outputs={outputs}", "evaluation.num_resamples=100", *more)


@pytest.fixture
def measure(toy: Lab) -> Callable[..., dict[str, Any]]:
    return lambda *more: evaluate.evaluate(toy.config("evaluate", f"run={toy.teacher}", *more))


# Values


def test_the_teacher_is_its_own_best_student(measure) -> None:  # type: ignore[no-untyped-def]
    """At the pairs' solver, grid and NFE on the same noise; another NFE is not."""
    same, other = measure(*AS_PAIRS), measure(*AS_PAIRS[:2], "nfe=1")
    assert same["paired_rmse"] < 1e-5 and same["fd_points_teacher"] < 1e-6 and abs(same["fd_points_added"]) < 1e-5
    assert other["paired_rmse"] > 0.05 and other["fd_points_teacher"] > 0.01


def test_images_against_their_teacher(images: Lab) -> None:
    """Batches of another size than the pairs' move them by rounding, and Lite0 sees a pixel move by a grey level at most."""
    metrics = evaluate.evaluate(images.config("evaluate", f"run={images.teacher}", *AS_PAIRS, "pairs.dtype=float32"))
    bands = [metrics[f"paired_mse_{band}"] for band in ("low", "mid", "high")]
    assert metrics["paired_rmse"] < 1e-5 and metrics["fd_lite0_teacher"] < 1e-3 * metrics["fd_lite0"]
    assert max(bands) < 1e-10
    assert metrics["fd_lite0"] > metrics["floor"] > 0 and metrics["paired_lite0"] < 1
    assert metrics["protocol"]["features"]["weight_hash"] == WEIGHT_HASH
    kept = np.load(Path(metrics["folder"]) / "samples.npy", allow_pickle=False)
    assert kept.shape == (64, 1, 32, 32) and kept.dtype == np.uint8
    assert not any("fid" in name.lower() for name in metrics)


def test_batches_of_any_size_give_the_same_distance(images: Lab) -> None:
    """End to end, float32: samples and features move by rounding alone."""
    few, one = (
        evaluate.evaluate(images.config("evaluate", f"run={images.teacher}", "nfe=2", f"evaluation.batch_size={size}"))
        for size in (10, 64)
    )
    for name in ("fd_lite0", "fd_lite0_teacher", "paired_rmse"):
        assert few[name] == pytest.approx(one[name], rel=1e-5)


def test_distance_falls_with_steps_to_the_floor(tmp_path: Path) -> None:
    found = [evaluate.measured(gaussian_config(tmp_path, f"nfe={nfe}", "inf=baseline"), EXACT) for nfe in (1, 2, 4, 8, 24)]
    distances = [metrics["fd_points"] for metrics in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.2 and distances[-1] < 0.01
    assert found[0]["floor"] == found[-1]["floor"] < 0.002
    assert len({metrics["straightness"] for metrics in found}) == 1  # of the flow, not of the sampler


def test_one_euler_step_has_the_distance_of_its_formula(tmp_path: Path) -> None:
    """x0 = x - t v with x = t z and v = x (t - (1-t)/4) / (t^2 + (1-t)^2/4) is normal; so is the data: FD = 2 (s - 1/2)^2."""
    t = 80 / 81
    s = t * (1 - t * (t - (1 - t) / 4) / (t**2 + ((1 - t) / 2) ** 2))
    metrics = evaluate.measured(gaussian_config(tmp_path, "nfe=1"), EXACT)
    low, high = metrics["intervals"]["fd_points"]
    assert low - 0.02 < 2 * (s - 0.5) ** 2 < high + 0.02


def test_every_interval_brackets_its_value(measure) -> None:  # type: ignore[no-untyped-def]
    metrics = measure("nfe=1")
    assert set(metrics["intervals"]) == {"fd_points", "fd_points_added", "fd_points_teacher", "paired_rmse"}
    for name, (low, high) in metrics["intervals"].items():
        assert low < metrics[name] < high
    resamples = read_json(Path(metrics["folder"]) / "resamples.json")
    assert {name: len(values) for name, values in resamples.items()} == dict.fromkeys(metrics["intervals"], 50)


def test_what_a_student_adds_is_a_difference_over_the_same_noise(toy: Lab, measure) -> None:  # type: ignore[no-untyped-def]
    """The teacher's share in it is the distance of a run that samples as the teacher did, resampled alike."""
    few, teacher = measure("nfe=1"), measure(*AS_PAIRS)
    assert few["fd_points_added"] == pytest.approx(few["fd_points"] - teacher["fd_points"], rel=1e-4)
    a, b = (read_json(Path(metrics["folder"]) / "resamples.json") for metrics in (few, teacher))
    expected = torch.tensor(a["fd_points"]) - torch.tensor(b["fd_points"])
    torch.testing.assert_close(torch.tensor(a["fd_points_added"]), expected, rtol=1e-4, atol=1e-5)
    spread = Z95 * expected.double().std().item()
    assert few["intervals"]["fd_points_added"] == pytest.approx(
        [few["fd_points_added"] - spread, few["fd_points_added"] + spread], rel=1e-3
    )


def test_calls_are_counted_whatever_was_asked_for(toy: Lab, measure) -> None:  # type: ignore[no-untyped-def]
    metrics = measure("inf/solver=adaptive", "nfe=4", "inf.solver.rtol=0.01")
    assert metrics["protocol"]["nfe"] == 4 and metrics["nfe"] > 6
    assert measure("nfe=5")["nfe"] == 5


def test_the_protocol_says_how(toy: Lab, measure) -> None:  # type: ignore[no-untyped-def]
    metrics = measure("nfe=5", "profile=raw")
    protocol, weights = metrics["protocol"], toy.teacher / "weights" / "raw.safetensors"
    assert protocol["solver"] == {"_target_": "reflow_lab.inf.solvers.DPM", "r": 0.4}
    assert len(protocol["grid"]) == 4 and protocol["grid"][0] == pytest.approx(80 / 81) and protocol["grid"][-1] == 0
    assert (protocol["profile"], protocol["weights"]) == ("raw", files.weights_hash(weights))
    assert (protocol["num_images"], protocol["precision"], protocol["t_max"]) == (1000, "32-true", pytest.approx(80 / 81))
    assert protocol["features"] == {"network": "points", "weight_hash": ""}
    assert json.loads((Path(metrics["folder"]) / "metrics.json").read_text())["protocol"] == protocol


def test_the_printed_line(measure, capsys) -> None:  # type: ignore[no-untyped-def]
    metrics = measure("nfe=2")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("N 1000, nfe 2: ") and line.count("nfe") == 1
    assert f"fd_points {metrics['fd_points']:.4g} ± " in line and f"floor {metrics['floor']:.4g}," in line


def test_samples_are_kept_for_pictures(measure) -> None:  # type: ignore[no-untyped-def]
    assert np.load(Path(measure("nfe=2")["folder"]) / "samples.npy", allow_pickle=False).shape == (800, 2)


# Artifacts


def test_the_same_cell_twice_needs_no_network(measure, request) -> None:  # type: ignore[no-untyped-def]
    first = measure("nfe=7")
    targets._SHARED.clear()
    request.getfixturevalue("no_network")
    assert measure("nfe=7") == first
    with pytest.raises(AssertionError, match="a network was called"):
        measure("nfe=6")


def test_cells_that_coincide_share_an_artifact_and_no_others(toy: Lab) -> None:
    run = parts.described(files.find(toy.teacher), parts.data_source(toy.config("evaluate")), "run")
    groups: dict[str, set[str]] = {}
    for solver, grid in product(("euler", "heun", "dpm", "rfpp"), ("uniform", "sigmoid", "edm")):
        cfg = toy.config("evaluate", T_MAX, f"inf/solver={solver}", f"inf/grid={grid}")
        for cfg.nfe in (1, 2, 3):
            groups.setdefault(evaluate.plan(cfg, run).key, set()).add(f"{solver} {grid} {cfg.nfe}")
    rules, symmetric = ("euler", "heun", "dpm"), ("uniform", "sigmoid")  # whose two steps are equal ones
    expected = [
        {f"{rule} {grid} 1" for rule in rules for grid in (*symmetric, "edm")},
        {f"{rule} {grid} 2" for rule in rules for grid in symmetric},
        {f"{rule} edm 2" for rule in rules},
        {f"rfpp {grid} 1" for grid in (*symmetric, "edm")},
        *({f"{rule} {grid} {nfe}" for grid in symmetric} for rule, nfe in (("rfpp", 2), ("heun", 3), ("dpm", 3))),
    ]
    assert sorted(map(sorted, (group for group in groups.values() if len(group) > 1))) == sorted(map(sorted, expected))


CHANGES = [
    "nfe=5",
    "t_max=0.9",
    "profile=raw",
    "evaluation.seed=8",
    "evaluation.num_resamples=60",
    "pairs.nfe=5",
    "inf.solver.r=0.5",
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_numbers_changes_the_artifact(toy: Lab, change: str) -> None:
    def key(*more: str) -> str:
        cfg = toy.config("evaluate", T_MAX, *more)
        return evaluate.plan(cfg, parts.described(files.find(toy.teacher, cfg.profile), parts.data_source(cfg), "run")).key

    assert key("nfe=3") != key("nfe=3", change)
    assert key() == key("trainer.log_every_kimg=1", "name=other", "nfe=9")


def test_straightness_and_references_depend_on_their_noise(measure) -> None:  # type: ignore[no-untyped-def]
    """In one process: what cells share is told apart by all that it depends on."""
    a, b = measure("nfe=2"), measure("nfe=2", "evaluation.seed=9")
    assert a["straightness"] != b["straightness"] and a["paired_rmse"] != b["paired_rmse"]
    assert a["floor"] == b["floor"] != measure("nfe=2", "evaluation.num_images=900")["floor"]


def test_an_edited_file_is_refused(measure) -> None:  # type: ignore[no-untyped-def]
    path = Path(measure("nfe=8")["folder"]) / "metrics.json"
    path.write_text(path.read_text().replace('"nfe": 8', '"nfe": 1'))
    with pytest.raises(UserError, match=f"^{path}: .*changed after it was written"):
        measure("nfe=8")


# Mistakes


MISTAKES = {
    "evaluation.num_images=3000": "evaluation.num_images=3000: the split reference has only 2000",
    "evaluation.num_images=1": "evaluation.num_images=1: must be a whole number of at least 50",
    "evaluation.batch_size=0": "evaluation.batch_size=0: must be",
    "evaluation.num_resamples=1": "evaluation.num_resamples=1: must be",
    "evaluation.straightness.nfe=0": "evaluation.straightness.nfe=0: must be",
    "evaluation.seed=1000": "evaluation.seed=1000: must differ from pairs.seed",
    "evaluation.num_seeds=0": "evaluation.num_seeds=0: must be",
    "evaluation.num_seeds=990": "evaluation.seed=1000: must differ from pairs.seed",
    "evaluation.reference=nowhere.npz": "evaluation.reference=nowhere.npz: no such file; null, all, or",
    "evaluation.metrics=[fid]": r"evaluation.metrics=\['fid'\]: must be a list of some of kid",
    "evaluation.metrics=[inception_score]": "evaluation.metrics=.*: inception_score needs evaluation/features=inception",
    "run=null": "run=null: give a run folder",
    "run=nowhere.safetensors": "nowhere.safetensors: no such file",
    "profile=ema3": "profile=ema3: allowed: ema0.1, raw",
    "nfe=0": "nfe=0: must be a whole number",
    "t_max=1.5": "t_max=1.5: must lie in",
    "inf/grid=listed": "grid.times=.*: the list has 5 steps, but .* take 2",
    "precision=fp8": "precision=fp8: allowed",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(measure, no_network, mistake: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=f"^{MISTAKES[mistake]}") as caught:
        measure(*([mistake] if mistake.startswith("nfe") else ["nfe=2", mistake]))
    assert "\n" not in str(caught.value)


def test_a_run_without_weights_or_done_mark_is_refused(toy: Lab, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for present in (False, True):
        if present:
            (weights / "raw.safetensors").write_bytes((toy.teacher / "weights" / "raw.safetensors").read_bytes())
        with pytest.raises(UserError, match="holds no finished training run"):
            evaluate.evaluate(toy.config("evaluate", f"run={tmp_path}"))


def test_a_run_of_other_data_is_refused(toy: Lab, images: Lab) -> None:
    with pytest.raises(UserError, match=r"makes samples of shape \(2,\), but the data has \(1, 32, 32\)"):
        evaluate.evaluate(images.config("evaluate", f"run={toy.teacher}"))


def test_weights_that_make_nan_are_refused(toy: Lab, tmp_path: Path) -> None:
    with safe_open(files.find(toy.teacher), "pt") as file:
        state, metadata = {name: file.get_tensor(name) * torch.nan for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(state, tmp_path / "nan.safetensors", metadata)
    cfg = toy.config("evaluate", f"run={tmp_path / 'nan.safetensors'}")
    for _ in range(2):  # nothing half-written is taken for whole
        with pytest.raises(UserError, match=r"nan\.safetensors: made \d+ NaN or infinite samples of \d+"):
            evaluate.evaluate(cfg)


# Costs


def test_the_cost_of_sampling(toy: Lab, measure) -> None:  # type: ignore[no-untyped-def]
    """Memory grows with the batch, by what a layer holds, and is at least that of the weights; the device is named."""
    small, large = measure("nfe=2", "evaluation.batch_size=100"), measure("nfe=2", "evaluation.batch_size=400")
    weights = sum(t.numel() * 4 for t in files.load(files.find(toy.teacher)).state_dict().values()) / 1e6
    assert weights < small["peak_memory_mb"] < large["peak_memory_mb"]
    assert large["peak_memory_mb"] - weights == pytest.approx(4 * (small["peak_memory_mb"] - weights), rel=0.05)
    assert small["device"] == parts.processor() and small["ms_per_image"] > 0


def test_a_single_batch_is_measured_as_several_are(toy: Lab, measure) -> None:  # type: ignore[no-untyped-def]
    one, several = measure("nfe=3", "evaluation.batch_size=1000"), measure("nfe=3", "evaluation.batch_size=400")
    assert one["nfe"] == several["nfe"] == 3
    assert one["paired_rmse"] == pytest.approx(several["paired_rmse"], rel=1e-4)


# What one may measure beside


def test_more_metrics_of_the_same_features(measure) -> None:  # type: ignore[no-untyped-def]
    found = measure("nfe=6", "evaluation.metrics=[kid,precision_recall]")
    plain = measure("nfe=6")
    assert found["fd_points"] == plain["fd_points"] and "kd_points" not in plain
    assert found["scores"] == ["kd_points", "kd_points_std", "precision", "recall"] and found["kd_points_std"] >= 0
    assert 0 < found["precision"] <= 1 and 0 < found["recall"] <= 1
    assert measure("nfe=1", "evaluation.metrics=[precision_recall]")["precision"] < found["precision"] - 0.2


def test_all_real_samples_or_their_statistics_may_be_the_reference(measure, tmp_path) -> None:  # type: ignore[no-untyped-def]
    some, whole = measure("nfe=6"), measure("nfe=6", "evaluation.reference=all", "evaluation.metrics=[kid]")
    assert whole["protocol"]["reference"] == {**some["protocol"]["reference"], "num_images": 2000}
    assert abs(whole["fd_points"] / some["fd_points"] - 1) < 0.2 and whole["fd_points"] != some["fd_points"]
    (kept,) = (Path(whole["folder"]).parents[1] / "reference").glob("*/statistics.npz")
    path = tmp_path / "statistics.npz"
    path.write_bytes(kept.read_bytes())
    named = measure("nfe=6", f"evaluation.reference={path}")
    assert named["fd_points"] == whole["fd_points"] and named["protocol"]["reference"]["statistics"] == file_hash(path)
    with pytest.raises(UserError, match="statistics are no samples"):
        measure("nfe=6", f"evaluation.reference={path}", "evaluation.metrics=[kid]")


def test_several_sets_of_samples(measure, capsys) -> None:  # type: ignore[no-untyped-def]
    """EDM's convention is the minimum; every set has noise of its own, and a cell of its own."""
    found = measure("nfe=6", "evaluation.num_seeds=3", "evaluation.metrics=[kid]")
    alone = [measure("nfe=6", f"evaluation.seed={11 + i}", "evaluation.metrics=[kid]") for i in range(3)]
    for name in ("fd_points", "fd_points_teacher", "paired_rmse", "kd_points"):
        values = [cell[name] for cell in alone]
        assert found["over_seeds"][name]["values"] == values and len(set(values)) == 3
        assert found["over_seeds"][name].get("min") == (min(values) if name.startswith("fd_") else None)
        assert found["over_seeds"][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert "fd_points over 3 sets of samples: minimum" in capsys.readouterr().out
    assert "over_seeds" not in alone[0]


def test_features_of_a_wrong_size_are_one_line(images: Lab, capsys) -> None:  # type: ignore[no-untyped-def]
    words = images.words(f"run={images.teacher}", "evaluation.features.resolution=8")
    assert main(["evaluate", *words]) == 2
    assert "evaluation.features.resolution=8: a whole number of at least 32" in capsys.readouterr().err


def test_an_experiment_that_wants_a_teacher_is_measured_against_the_data_without_one(toy: Lab, capsys) -> None:  # type: ignore[no-untyped-def]
    words = [*toy.overrides, f"outputs={toy.outputs}", f"run={toy.teacher}", "nfe=2", "evaluation.num_images=200"]
    assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    assert "measured against the data alone" in said and "fd_points_teacher" not in said
