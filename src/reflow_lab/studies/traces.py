"""What a report shows of a study's flows beside the table, and needs the weights for: paths of a few samples, curves over t."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from .. import parts
from ..artifacts import Artifact, artifact, read_json, write_atomically, write_json
from ..evaluation import curvature
from ..evaluation.evaluate import held_out_noise
from ..evaluation.straightness import Trace
from ..inf.grids import Uniform
from ..inf.sampler import sample
from ..inf.solvers import Euler
from ..networks import files
from ..parts import Teacher

VERSION = 1  #: of the recipe: increment when the same configuration means another result
NUM_STEPS = 32  #: Euler's, uniform in t
NUM_SAMPLES = {"pixels": 3, "points": 20}  #: whose paths are kept
PLACES = ((0.35, 0.35), (0.35, 0.65), (0.65, 0.35), (0.65, 0.65))  #: the pixels: height and width, as shares of the image
NUM_CURVED = 32  #: paths that the curves over t are of
BINS = {"num_bins": 16, "per_bin": 2}
DIGITS = 4  #: after the point
SERIES = re.compile(r"by_time/t([\d.]+)/relative_loss_(min|mean|max)")


def write(out: Path, rows: Mapping[str, tuple[DictConfig, Path]]) -> None:
    """Write traces.json into a study's folder: of each row, by name, the configuration and the run folder of its first seed.

    A row has `paths` and `along_time` of its flow, unguided and whatever the row's sampler, on the first held-out noise, and
    `relative_loss`, the last that its training logged, null without one. About 5 kB a row of images, 12 kB of points.
    """
    found = {name: trace(cfg, folder) for name, (cfg, folder) in rows.items()}
    text = json.dumps({"rows": found}, separators=(",", ":"), sort_keys=True)
    write_atomically(out / "traces.json", lambda path: path.write_text(text + "\n"))


def trace(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """One row's; rows that share their weights share its artifact, so that a study which is done calls no network."""
    run = parts.described(files.find(folder), parts.data_source(cfg), "run")
    made = plan(cfg, run)
    with made.locked():
        if not made.is_done():
            made.begin()
            write_json(made.folder / "trace.json", look(cfg, run))
            made.finish()
    return read_json(made.folder / "trace.json") | {"relative_loss": relative_loss(folder / "metrics.jsonl")}


def plan(cfg: DictConfig, run: Teacher) -> Artifact:
    """The artifact: weights, noise and precision; how it is looked at belongs to the recipe's version."""
    about = {"t_max": cfg.t_max, "precision": cfg.precision, "seed": cfg.evaluation.seed}
    return artifact(cfg.outputs, "traces", VERSION, weights=run.hash, **about)


def look(cfg: DictConfig, run: Teacher) -> dict[str, Any]:
    """The paths and the curves of a flow."""
    velocity = run.velocity(cfg)
    x1, label = held_out_noise(cfg, run, np.arange(NUM_CURVED))
    bent = curvature.along_time(velocity, x1, t_max=cfg.t_max, label=label, **BINS)
    kind = "pixels" if x1.ndim == 4 else "points"
    num = NUM_SAMPLES[kind]
    times, states = euler(velocity, x1[:num], cfg.t_max, None if label is None else label[:num])
    return {
        "weights": run.hash,
        "paths": {"kind": kind, "t": rounded(times), **(pixels(states) if kind == "pixels" else points(states))},
        "along_time": {
            "t": rounded(bent.t),
            "num": NUM_CURVED,
            "deviation": mean_and_error(bent.deviation),
            "acceleration": mean_and_error(bent.acceleration),
        },
    }


def euler(velocity: Any, x1: Tensor, t_max: float, label: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Times (NUM_STEPS + 1,) from t_max down to 0, and the states there, (NUM_STEPS + 1, n, ...)."""
    seen = Trace()
    end = sample(velocity, x1, solver=Euler(), grid=Uniform(), nfe=NUM_STEPS, t_max=t_max, label=label, callback=seen)
    return np.array([*seen.times, 0.0]), np.stack([x.float().cpu().numpy() for x in (*seen.states, end)])


def pixels(states: np.ndarray) -> dict[str, Any]:
    """The first channel at PLACES in images (steps, n, c, h, w): `value`, a list over t for each, and `place`, [sample, y, x]."""
    num, _, height, width = states.shape[1:]
    places = [[i, int(y * height), int(x * width)] for i in range(num) for y, x in PLACES]
    return {"place": places, "value": [rounded(states[:, i, 0, y, x]) for i, y, x in places]}


def points(states: np.ndarray) -> dict[str, Any]:
    """The first and last coordinates of points (steps, n, dim), as pictures of samples have them: `x` and `y`, (n, steps)."""
    return {"x": [rounded(path) for path in states[:, :, 0].T], "y": [rounded(path) for path in states[:, :, -1].T]}


def mean_and_error(values: Tensor) -> dict[str, list[float]]:
    """The mean over paths of (n, bins) values, and its standard error, in six significant digits: they span decades."""
    found = {"mean": values.mean(0), "standard_error": values.std(0) / len(values) ** 0.5}
    return {name: [float(f"{v:.6g}") for v in value.tolist()] for name, value in found.items()}


def rounded(values: np.ndarray | Tensor) -> list[float]:
    """Plain numbers, as long as a picture needs."""
    return [round(float(v), DIGITS) for v in values]


def relative_loss(path: Path) -> dict[str, list[float]] | None:
    """By time, the losses of held-out pairs over their mean, as a training logged them last: t, min, mean, max."""
    lines = path.read_text().splitlines() if path.exists() else []
    last = next((line for line in reversed(lines) if "/relative_loss_mean" in line), None)
    if last is None:
        return None
    found: dict[float, dict[str, float]] = {}
    for key, value in json.loads(last).items():
        if match := SERIES.fullmatch(key):
            found.setdefault(float(match[1]), {})[match[2]] = float(f"{value:.6g}")
    times = sorted(found)
    return {"t": times} | {how: [found[t][how] for t in times] for how in ("min", "mean", "max")}
