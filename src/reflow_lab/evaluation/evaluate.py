"""The verb `evaluate`: one trained flow at one number of steps, measured against the data and against its teacher."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from .. import parts
from ..artifacts import Artifact, artifact, read_json, write_json
from ..data.sets import to_uint8
from ..errors import require
from ..inf.grids import Uniform
from ..inf.sampler import CountCalls, sample, sampling_times
from ..inf.solvers import Euler, Solver, TwoCall
from ..lrn import pairs
from ..lrn.store import pair_labels, pair_noise
from ..networks import files
from ..noise import Indices
from ..parts import Teacher
from ..progress import Bar
from .features import Lite0Features
from .frechet import Linearised, Reference
from .intervals import interval, linear_bootstrap, mean_bootstrap
from .paired import BANDS, feature_distance, paired_mse_by_band, paired_rmse
from .straightness import sample_straightness

VERSION = 1  #: of the recipe: increment when the same configuration means another result
NUM_SHOWN = 64  #: first samples kept as bytes, for pictures


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure `run` at `nfe`, or read the result if it is there; prints a line and returns the metrics."""
    parts.check(cfg)
    run = parts.described(files.find(parts.require_run(cfg.run), cfg.profile), parts.data_source(cfg), "run")
    metrics = measured(cfg, run)
    shown = {k: f"{v:.4g}" for k, v in metrics.items() if isinstance(v, float)}
    print(f"nfe {cfg.nfe}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    return metrics


def measured(cfg: DictConfig, run: Teacher) -> dict[str, Any]:
    """The metrics of one cell of a table, from its artifact."""
    made = plan(cfg, run)
    with made.locked():
        if not made.is_done():
            made.begin()
            metrics, shown, resamples = measure(cfg, run)
            np.save(made.folder / "samples.npy", shown.numpy(), allow_pickle=False)
            write_json(made.folder / "resamples.json", resamples)
            write_json(made.folder / "metrics.json", metrics)
            made.finish()
    return read_json(made.folder / "metrics.json") | {"folder": str(made.folder)}


def plan(cfg: DictConfig, run: Teacher) -> Artifact:
    """The artifact of a cell. Cells that coincide, as all two-call solvers do at 1 and 2 NFE, share one."""
    solver, grid = effective_solver(instantiate(cfg.inf.solver), cfg.nfe), instantiate(cfg.inf.grid)
    held = parts.data_source(cfg)
    return artifact(
        cfg.outputs,
        "evaluate",
        VERSION,
        weights=run.hash,
        solver=repr(solver),
        times=[round(t, 12) for t in sampling_times(solver, grid, cfg.nfe, cfg.t_max).tolist()],
        nfe=cfg.nfe,
        precision=cfg.precision,
        evaluation=parts.plain(cfg.evaluation),
        data={name: held.split(name).content_hash for name in ("reference", "floor")},
        teacher=None if cfg.teacher.path is None else teacher_samples_plan(cfg).key,
    )


def effective_solver(solver: Solver, nfe: int) -> Solver:
    """Two-call rules are Euler's at 1 and 2 NFE."""
    return Euler() if isinstance(solver, TwoCall) and nfe <= 2 else solver


def teacher_samples_plan(cfg: DictConfig) -> Artifact:
    """The store of the teacher's many-step samples of the held-out noise: backward pairs of another seed."""
    require(
        cfg.evaluation.seed != cfg.pairs.seed,
        "evaluation.seed",
        cfg.evaluation.seed,
        "must differ from pairs.seed: held-out noise",
    )
    return pairs.plan(cfg, "backward", cfg.evaluation.num_images, cfg.evaluation.seed)


def is_images(cfg: DictConfig) -> bool:
    """Whether the data are images; points have no resolution."""
    return "resolution" in cfg.data


def distance_name(cfg: DictConfig) -> str:
    """The Fréchet distance is called after its features, never FID."""
    return "fd_lite0" if is_images(cfg) else "fd_points"


def features(cfg: DictConfig, samples: Tensor) -> Tensor:
    """Lite0 features of images, (n, 1280); points (n, dim) are their own."""
    return Lite0Features(**cfg.evaluation.features)(samples) if is_images(cfg) else samples


_SHARED: dict[str, Any] = {}


def once(key: str, make: Callable[[], Any]) -> Any:
    """What the cells of a study share, made once a process."""
    if key not in _SHARED:
        _SHARED[key] = make()
    return _SHARED[key]


def split_features(cfg: DictConfig, name: str) -> Tensor:
    """Features of the first `num_images` real samples of a split."""
    split, num = parts.data_source(cfg).split(name), cfg.evaluation.num_images
    allowed = f"the split {name} has only {len(split)} samples, and distances of different numbers do not compare"
    require(2 <= num <= len(split), "evaluation.num_images", num, allowed)
    key = f"{split.content_hash} {num} {cfg.evaluation.features}"
    return once(key, lambda: features(cfg, split.take(torch.arange(num))[0]))


def reference(cfg: DictConfig) -> tuple[Reference, float]:
    """The real samples to measure against, and the floor: the distance of as many other real samples to them."""
    real = split_features(cfg, "reference")

    def make() -> tuple[Reference, float]:
        reference = Reference.of(real)
        return reference, reference.distance(split_features(cfg, "floor"))

    return once(f"reference {id(real)}", make)


class TeacherSamples(NamedTuple):
    """The teacher's many-step samples of the held-out noise, with their features."""

    x0: Tensor
    features: Tensor
    reference: Reference


def teacher_samples(cfg: DictConfig) -> TeacherSamples:
    """Generated first if they are missing."""

    def make() -> TeacherSamples:
        store = pairs.ensure(cfg, "backward", cfg.evaluation.num_images, cfg.evaluation.seed)
        x0 = store.stored(np.arange(len(store)))
        found = features(cfg, x0)
        return TeacherSamples(x0, found, Reference.of(found))

    return once(teacher_samples_plan(cfg).key + str(cfg.evaluation.features), make)


class Samples(NamedTuple):
    """What a cell's sampler made."""

    x0: Tensor
    calls_per_image: float
    ms_per_image: float


def draw(cfg: DictConfig, run: Teacher) -> Samples:
    """Images from the held-out noise, batch by batch, timed."""
    number, device = cfg.evaluation.num_images, parts.device(cfg)
    velocity = CountCalls(run.velocity(cfg))
    solver, grid = instantiate(cfg.inf.solver), instantiate(cfg.inf.grid)
    made, seconds = [], 0.0
    with Bar(f"{cfg.name or run.hash} nfe {cfg.nfe}", number, "images") as bar:
        for chunk in np.split(np.arange(number), range(cfg.evaluation.batch_size, number, cfg.evaluation.batch_size)):
            x1, label = held_out_noise(cfg, run, chunk)
            begin = time.perf_counter()
            x0 = sample(velocity, x1.to(device), solver=solver, grid=grid, nfe=cfg.nfe, t_max=cfg.t_max, label=label).cpu()
            seconds += time.perf_counter() - begin
            made.append(x0)
            bar.advance(len(chunk))
    return Samples(torch.cat(made), velocity.nfe(number), 1000 * seconds / number)


def held_out_noise(cfg: DictConfig, run: Teacher, indices: Indices) -> tuple[Tensor, Tensor | None]:
    """The noise, and labels of a conditional flow, that the teacher's samples were drawn from too."""
    label = pair_labels(cfg.evaluation.seed, indices, run.num_classes)
    shape = parts.sample_shape(parts.data_source(cfg))
    return pair_noise(cfg.evaluation.seed, indices, shape), None if label is None else label.to(parts.device(cfg))


def flow_straightness(cfg: DictConfig, run: Teacher) -> float:
    """How straight the flow is, whatever the sampler of the row: Euler with many uniform steps."""
    settings = cfg.evaluation.straightness

    def make() -> float:
        x1, label = held_out_noise(cfg, run, np.arange(settings.num_images))
        at = {"solver": Euler(), "grid": Uniform(), "nfe": settings.nfe, "t_max": cfg.t_max}
        return sample_straightness(run.velocity(cfg), x1.to(parts.device(cfg)), label=label, **at)[1].mean().item()

    return once(f"straightness {run.hash} {settings} {cfg.t_max} {cfg.precision}", make)


def measure(cfg: DictConfig, run: Teacher) -> tuple[dict[str, Any], Tensor, dict[str, list[float]]]:
    """The metrics of a cell, its first samples, and the bootstrap values by which cells are compared."""
    drawn, name = draw(cfg, run), distance_name(cfg)
    require(bool(drawn.x0.isfinite().all()), "run", run.path, "made NaN or infinite samples")
    found, resamples = features(cfg, drawn.x0), Resamples(cfg)
    real, floor = reference(cfg)
    resamples.distance(name, real.linearise(found))
    if cfg.teacher.path is not None:
        against_teacher(cfg, drawn.x0, found, resamples)
    metrics = {
        "num_images": cfg.evaluation.num_images,
        "nfe": drawn.calls_per_image,
        "floor": floor,
        "straightness": flow_straightness(cfg, run),
        "ms_per_image": drawn.ms_per_image,
        **resamples.values,
        "intervals": resamples.intervals(),
    }
    shown = drawn.x0[:NUM_SHOWN]
    return metrics, to_uint8(shown) if is_images(cfg) else shown, {k: v.tolist() for k, v in resamples.vectors.items()}


class Resamples:
    """Values of metrics with their bootstrap vectors: every cell resamples the same noise, so that differences can be formed."""

    def __init__(self, cfg: DictConfig) -> None:
        self.how = (cfg.evaluation.num_resamples, cfg.evaluation.seed)
        self.values: dict[str, float] = {}
        self.vectors: dict[str, Tensor] = {}

    def distance(self, name: str, linearised: Linearised) -> None:
        """A Fréchet distance, by its influence function."""
        self.values[name] = linearised.distance
        self.vectors[name] = linear_bootstrap(*linearised, *self.how)

    def mean(self, name: str, per_sample: Tensor) -> None:
        """The mean of per-sample values (n,)."""
        self.values[name] = per_sample.double().mean().item()
        self.vectors[name] = mean_bootstrap(per_sample, *self.how)

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals over the held-out noise, [low, high]."""
        found = {name: interval(value, self.vectors[name]) for name, value in self.values.items()}
        return {name: [low, high] for name, (_, _, low, high) in found.items()}


def against_teacher(cfg: DictConfig, x0: Tensor, found: Tensor, resamples: Resamples) -> None:
    """The distances to the teacher's samples of the same noise: as sets, in pixels, by frequency band, in features."""
    teacher = teacher_samples(cfg)
    own = teacher.reference.linearise(found, teacher.features)
    resamples.distance(f"{distance_name(cfg)}_teacher", own)
    resamples.mean("paired_rmse", paired_rmse(x0, teacher.x0))
    if is_images(cfg):
        for band, values in zip(BANDS, paired_mse_by_band(x0, teacher.x0).unbind(1), strict=True):
            resamples.mean(f"paired_mse_{band}", values)
        resamples.mean("paired_lite0", feature_distance(found, teacher.features))
