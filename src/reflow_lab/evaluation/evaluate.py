"""The verb `evaluate`: one trained flow at one number of steps, measured against the data and against its teacher."""

import copy
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from .. import parts, tracking
from ..artifacts import Artifact, artifact, read_json, write_atomically, write_json
from ..data.sets import to_uint8
from ..errors import require
from ..flow import MeanVelocity
from ..inf import auto, guidance
from ..inf.grids import Uniform
from ..inf.sampler import CountCalls, advise, require_suited, sample, sampling_times
from ..inf.solvers import Euler, FlowMap, TwoCall
from ..lrn.store import pair_labels, pair_noise
from ..networks import files
from ..noise import Indices, chunks
from ..parallel import rank, take_own_gpu
from ..parts import Teacher
from . import scores, vectors
from .features import identity
from .frechet import Linearised
from .inception import NUM_LOGITS, InceptionFeatures
from .intervals import interval, linear_bootstrap, mean_bootstrap
from .memory import peak_memory_mb
from .metrics import FLOOR, warn_of_few
from .paired import BANDS, feature_distance, paired_mse, paired_mse_by_band
from .straightness import sample_straightness
from .targets import (
    about_reference,
    distance_name,
    feature_network,
    features,
    is_images,
    looked_at,
    once,
    reference,
    statistics_in,
    teacher_distance,
    teacher_samples,
    teacher_samples_plan,
)
from .values import ADDED, PAIRED, TEACHER, plus_minus
from .vectors import Vectors

VERSION = 5  #: of the recipe: increment when the same configuration means another result
NOT_MEASURING = (
    "search",
    "num_seeds",
    "features",
    "reference",
    "metrics",
)  #: settings that change no cell, or are said by what they name
NUM_SHOWN = {"images": 64, "points": 800}  #: first samples kept, for pictures


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure `run` at `nfe`, or read the result if it is there; prints a line and returns the metrics."""
    take_own_gpu()
    run = parts.described(files.find(parts.require_run(cfg.run), cfg.profile), parts.data_source(cfg), "run")
    if OmegaConf.is_missing(cfg.teacher, "path"):  # an experiment that wants a teacher, given none: the data will do
        cfg.teacher.path = None
        print("measured against the data alone; with teacher.path=... against its teacher's samples too")
    if cfg.t_max is None:
        cfg.t_max = run.t_max
    check(cfg)
    untold = "searches samplers of velocities; this is a flow map, whose own is inf=flow_map"
    require(not (auto.is_asked(cfg) and files.jumps(run.description)), "inf", "auto", untold)
    require_suited(solver := instantiate(cfg.inf.solver), run.description, instantiate(cfg.inf.guidance))
    advise(solver, run.description)
    found = [settled(one, run) for one in by_seed(cfg)]
    metrics = over_seeds([measured(one, run) for one in found])
    if rank() == 0:
        print(f"{run.path}, {sampler_words(found[0], metrics)}: {metrics['folder']}")
        print(summary(metrics))
    tracking.evaluated(cfg, run.path, [metrics])
    return metrics


def sampler_words(cfg: DictConfig, metrics: dict[str, Any]) -> str:
    """Solver, grid and guidance of a cell, for people."""
    led = metrics["protocol"]["guidance"]
    return auto.words(cfg.inf) + (f", {guidance.in_words(led)}" if led else "")


def by_seed(cfg: DictConfig) -> list[DictConfig]:
    """The configuration once for each of `evaluation.num_seeds` sets of samples."""
    found = []
    for number in range(cfg.evaluation.num_seeds):
        one = copy.deepcopy(cfg)
        one.evaluation.seed += number
        found.append(one)
    return found


def over_seeds(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the first set of samples; of several `over_seeds`, with each metric's minimum, mean and spread."""
    first, names = cells[0], [*cells[0]["intervals"], *cells[0]["scores"]]
    least = (first["distance"], first["distance"] + TEACHER)  # whose minimum is the field's habit
    values = {name: [cell[name] for cell in cells] for name in names}
    spread = {
        name: {
            **({"min": min(found)} if name in least else {}),
            "mean": statistics.fmean(found),
            "std": statistics.stdev(found),
            "values": found,
        }
        for name, found in values.items()
        if len(cells) > 1
    }
    return first | ({"over_seeds": spread} if spread else {})


def summary(metrics: dict[str, Any]) -> str:
    """A line for people: every number, with half of its 95 % interval."""
    halves = {name: (high - low) / 2 for name, (low, high) in metrics["intervals"].items()}
    numbers = {name: v for name, v in metrics.items() if isinstance(v, float) and name not in ("nfe", "network_calls")}
    shown = ", ".join(f"{name} {plus_minus(value, halves.get(name, math.nan))}" for name, value in numbers.items())
    nfe, calls = metrics["nfe"], metrics["network_calls"]
    lines = [f"N {metrics['num_images']}, nfe {nfe:g}{f', network calls {calls:g}' if calls != nfe else ''}: {shown}"]
    for name, found in metrics.get("over_seeds", {}).items():
        least = f"minimum {found['min']:.4g}, " if "min" in found else ""
        few = f"{least}mean {found['mean']:.4g}, standard deviation {found['std']:.2g}"
        lines.append(f"  {name} over {len(found['values'])} sets of samples: {few}")
    return "\n".join(lines)


def check(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings under which no cell could be measured, before any of the work."""
    parts.check(cfg)
    options, grid_steps = cfg.evaluation, ("straightness.num_images", "straightness.nfe")
    lows = {"num_images": FLOOR, "num_seeds": 1, "num_resamples": 2, "seed": 0, "batch_size": 1, **dict.fromkeys(grid_steps, 1)}
    for key, low in lows.items():
        value = OmegaConf.select(options, key)
        require(isinstance(value, int) and value >= low, f"evaluation.{key}", value, f"must be a whole number of at least {low}")
    for name in ("reference", "floor"):
        has, num = len(parts.data_source(cfg).split(name)), options.num_images
        allowed = f"the split {name} has only {has} samples, and distances of different numbers do not compare"
        free = options.reference is not None or (name == "floor" and has == 0)
        require(num <= has or free, "evaluation.num_images", num, allowed)
    seeds = range(options.seed, options.seed + options.num_seeds)
    seen = "must differ from pairs.seed: students have seen that noise"
    require(cfg.pairs.seed not in seeds, "evaluation.seed", cfg.pairs.seed, seen)
    times(cfg)
    scores.check(parts.plain(options.metrics), feature_network(cfg), options.reference)
    about_reference(cfg)
    if options.reference not in (None, "all"):
        statistics_in(Path(options.reference), feature_network(cfg))
    if cfg.teacher.path is not None:
        teacher_samples_plan(cfg)
    if auto.is_asked(cfg):
        check_search(cfg)


def check_search(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings under which no sampler could be searched, or on the noise that it is reported on."""
    search = cfg.evaluation.search
    auto.check(search.num_trials)
    parts.require_whole("evaluation.search.seed", search.seed, 0)
    parts.require_whole("evaluation.search.num_images", search.num_images, FLOOR)
    used = (*range(cfg.evaluation.seed, cfg.evaluation.seed + cfg.evaluation.num_seeds), cfg.pairs.seed)
    others = "must differ from evaluation.seed and pairs.seed: a sampler is reported on noise that it was not chosen on"
    require(search.seed not in used, "evaluation.search.seed", search.seed, others)
    has = len(parts.data_source(cfg).split("reference"))
    allowed = f"the split reference has only {has} samples"
    require(
        search.num_images <= has or cfg.evaluation.reference is not None,
        "evaluation.search.num_images",
        search.num_images,
        allowed,
    )


def settled(cfg: DictConfig, run: Teacher) -> DictConfig:
    """The configuration with the sampler that `inf=auto` finds for this run and NFE, searched first where that is not done.

    The search draws other noise than the evaluation, from `evaluation.search.seed`.
    """
    if not auto.is_asked(cfg):
        return cfg
    tuning = copy.deepcopy(cfg)
    tuning.evaluation.seed, tuning.evaluation.num_images = cfg.evaluation.search.seed, cfg.evaluation.search.num_images
    fixed = {key: value for key, value in protocol(tuning, run).items() if key not in ("solver", "grid")}
    how = {"search": parts.plain(cfg.evaluation.search), "optuna": importlib.metadata.version("optuna")}
    made = artifact(cfg.outputs, "sampler", auto.VERSION, **fixed, **how)
    found = auto.ensure(made, lambda: tuning_distance(tuning, run), f"sampler for nfe {cfg.nfe}")
    return auto.with_sampler(cfg, found)


def tuning_distance(cfg: DictConfig, run: Teacher) -> Callable[[auto.Nodes], float]:
    """How far a sampler's samples are from the teacher's of that noise, without a teacher from the data; inf where not finite."""
    velocity, batches = parts.velocity(cfg, run), chunks(np.arange(cfg.evaluation.num_images), cfg.evaluation.batch_size)
    noise = [held_out_noise(cfg, run, chunk) for chunk in batches]
    target = reference(cfg).reference if cfg.teacher.path is None else teacher_samples(cfg).reference
    known: dict[str, float] = {}

    def distance(sampler: auto.Nodes) -> float:
        tried = auto.with_sampler(cfg, sampler)
        same = str((effective_solver(tried), times(tried)))  # at 1 and 2 NFE many samplers coincide
        if same not in known:
            x0 = torch.cat([from_noise(tried, velocity, *batch) for batch in noise])
            known[same] = target.distance(features(cfg, x0)) if x0.isfinite().all() else math.inf
        return known[same]

    return distance


def measured(cfg: DictConfig, run: Teacher) -> dict[str, Any]:
    """The metrics of one cell of a table, from its artifact; several processes draw its samples together."""
    made = plan(cfg, run)
    drawn = vectors.plan(
        cfg.outputs, cfg.evaluation.num_images, sum(columns(cfg).values()), cfg.evaluation.batch_size, cell=made.key
    )
    with vectors.passing(drawn, made.folder / ".drawn.lock"):
        if not made.is_done():
            drawing = Drawing(cfg, run, made.folder)
            rows = vectors.fill(drawn, drawing.rows, parts.device(cfg), f"{cfg.name or run.hash} nfe {cfg.nfe}")
            with made.locked():
                if not made.is_done():
                    made.begin()
                    metrics, resamples = measure(cfg, run, rows, drawing.cost())
                    write_json(made.folder / "resamples.json", resamples)
                    write_json(made.folder / "metrics.json", metrics)
                    made.finish()
    return read_json(made.folder / "metrics.json") | {"folder": str(made.folder)}


def plan(cfg: DictConfig, run: Teacher) -> Artifact:
    """The artifact of a cell: its recipe is its protocol, so that cells that coincide share one."""
    return artifact(cfg.outputs, "evaluate", VERSION, **protocol(cfg, run))


def protocol(cfg: DictConfig, run: Teacher) -> dict[str, Any]:
    """How a cell is measured: all that its numbers depend on, hashes of weights and data included."""
    held, against = parts.data_source(cfg), about_reference(cfg)
    metrics = parts.plain(cfg.evaluation.metrics)
    return {
        "weights": run.hash,
        "profile": run.description.get("profile"),
        "solver": effective_solver(cfg),
        "grid": [round(t, 12) for t in times(cfg)],
        "nfe": cfg.nfe,
        "t_max": cfg.t_max,
        "guidance": parts.guidance(cfg, run).recipe,
        "precision": cfg.precision,
        "num_images": cfg.evaluation.num_images,
        "evaluation": {key: value for key, value in parts.plain(cfg.evaluation).items() if key not in NOT_MEASURING},
        "features": identity(feature_network(cfg)),
        "reference": against,
        "scores": scores.about(metrics, cfg.evaluation.num_images, against["num_images"]),
        "data": {name: held.split(name).content_hash for name in ("reference", "floor")},
        "teacher": None if cfg.teacher.path is None else teacher_samples_plan(cfg).key,
    }


def times(cfg: DictConfig) -> list[float]:
    """The grid of times that the sampler stops at."""
    return sampling_times(instantiate(cfg.inf.solver), instantiate(cfg.inf.grid), cfg.nfe, cfg.t_max).tolist()


def effective_solver(cfg: DictConfig) -> dict[str, Any]:
    """The configured solver, or what is the same at so few calls.

    Euler's rule for a two-call solver with no call to spare for a second one, as at 1 and 2 NFE; a single jump adds no noise.
    """
    solver = instantiate(cfg.inf.solver)
    if isinstance(solver, FlowMap):
        return {**parts.plain(cfg.inf.solver), "gamma": float(solver.gamma) if cfg.nfe > 1 else 0.0}
    is_euler = isinstance(solver, TwoCall) and solver.num_steps(cfg.nfe, cfg.t_max, 0.0) == cfg.nfe
    return {"_target_": f"{Euler.__module__}.Euler"} if is_euler else parts.plain(cfg.inf.solver)


class Cost(NamedTuple):
    """What sampling cost: calls a sample, the median time over batches, the memory of a batch."""

    nfe: float
    network_calls: float
    ms_per_image: float
    peak_memory_mb: float


class Drawing:
    """A cell's samples as they are drawn, batch by batch, and what that costs; kept is what is measured of each, and a few.

    Its rows hold a sample's features, the logits that the Inception Score is made of, and its errors to the teacher's sample.
    """

    def __init__(self, cfg: DictConfig, run: Teacher, folder: Path) -> None:
        self.cfg, self.run, self.folder = cfg, run, folder
        self.network = parts.velocity(cfg, run)
        self.velocity, self.peak, self.ms, self.num = CountCalls(self.network), math.nan, list[float](), 0

    def rows(self, indices: Indices) -> Iterator[Tensor]:
        """What is measured of these samples, float32 (m, width) a batch; raises a `UserError` for samples that are not finite."""
        shown, num = list[Tensor](), NUM_SHOWN["images" if is_images(self.cfg) else "points"]
        for chunk in chunks(indices, self.cfg.evaluation.batch_size):
            x0 = self.samples(chunk)
            bad = int((~x0.flatten(1).isfinite()).any(1).sum())
            said = f"made {bad} NaN or infinite samples of {len(x0)}, numbers {chunk[0]} to {chunk[-1]}"
            require(bad == 0, "run", self.run.path, said)
            shown += [x0] if chunk[0] < num else []
            yield torch.cat([*seen(self.cfg, x0), *errors(self.cfg, x0, chunk)], dim=1)
        if indices[0] == 0:
            self.keep(torch.cat(shown)[:num])

    def samples(self, chunk: Indices) -> Tensor:
        """A batch of samples; the first sets up and is watched for its memory, the others are timed."""
        x1, label = held_out_noise(self.cfg, self.run, chunk)
        self.num += len(chunk)
        if math.isnan(self.peak):
            x0, self.peak = peak_memory_mb(lambda: self.draw(x1, label), self.network, parts.device(self.cfg))
            return x0
        begin = time.perf_counter()
        x0 = self.draw(x1, label)
        self.ms.append(1000 * (time.perf_counter() - begin) / len(chunk))
        return x0

    def draw(self, x1: Tensor, label: Tensor | None) -> Tensor:
        """Samples on the CPU."""
        return from_noise(self.cfg, self.velocity, x1, label)

    def keep(self, x0: Tensor) -> None:
        """Write the first samples down, for pictures: images as bytes, or points."""
        shown = (to_uint8(looked_at(self.cfg, x0)).cpu() if is_images(self.cfg) else x0).numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "samples.npy", lambda path: save_array(path, shown))

    def cost(self) -> Cost:
        """Of what this process has drawn; where that was no more than one batch, the first one again."""
        while not self.ms:
            self.samples(np.arange(min(self.cfg.evaluation.batch_size, self.cfg.evaluation.num_images)))
        calls = self.velocity.nfe(self.num), self.velocity.network_calls(self.num)
        return Cost(*calls, statistics.median(self.ms), self.peak)


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array under exactly this name: numpy would add its suffix."""
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def columns(cfg: DictConfig) -> dict[str, int]:
    """What a row holds, in this order, and how many numbers of each."""
    logits = NUM_LOGITS if "inception_score" in cfg.evaluation.metrics else 0
    paired = 0 if cfg.teacher.path is None else 1 + len(BANDS) if is_images(cfg) else 1
    return {"features": feature_network(cfg).num_features, "logits": logits, "paired": paired}


def column(cfg: DictConfig, rows: Vectors, name: str) -> Vectors:
    """The part of the rows that bears this name."""
    widths = columns(cfg)
    first = sum(list(widths.values())[: list(widths).index(name)])
    return rows.columns(first, first + widths[name])


def seen(cfg: DictConfig, x0: Tensor) -> list[Tensor]:
    """Features (n, d) of samples, and logits where they are asked for."""
    network = feature_network(cfg)
    if not columns(cfg)["logits"]:
        return [features(cfg, x0)]
    assert isinstance(network, InceptionFeatures)
    return list(network.outputs(looked_at(cfg, x0)))


def errors(cfg: DictConfig, x0: Tensor, indices: Indices) -> list[Tensor]:
    """The errors of samples to their teacher's of the same noise, where there is one: (n, 1) in all, (n, 3) by band."""
    if cfg.teacher.path is None:
        return []
    theirs = teacher_samples(cfg).store.stored(indices)
    bands = [paired_mse_by_band(x0, theirs).float()] if is_images(cfg) else []
    return [paired_mse(x0, theirs).float()[:, None], *bands]


def from_noise(cfg: DictConfig, velocity: MeanVelocity, x1: Tensor, label: Tensor | None) -> Tensor:
    """Samples on the CPU from noise x1, as the configuration says."""
    how = {"solver": instantiate(cfg.inf.solver), "grid": instantiate(cfg.inf.grid), "nfe": cfg.nfe, "t_max": cfg.t_max}
    return sample(velocity, x1, label=label, **how).cpu()


def held_out_noise(cfg: DictConfig, run: Teacher, indices: Indices) -> tuple[Tensor, Tensor | None]:
    """The noise, and labels of a conditional flow, that the teacher's samples were drawn from too, on the device."""
    seed, device = cfg.evaluation.seed, parts.device(cfg)
    x1 = pair_noise(seed, indices, parts.sample_shape(parts.data_source(cfg)))
    label = pair_labels(seed, indices, run.num_classes)
    return x1.to(device), None if label is None else label.to(device)


def flow_straightness(cfg: DictConfig, run: Teacher) -> float:
    """How straight the flow is, unguided and whatever the sampler of the row: Euler with many uniform steps."""
    settings, seed = cfg.evaluation.straightness, cfg.evaluation.seed

    def make() -> float:
        x1, label = held_out_noise(cfg, run, np.arange(settings.num_images))
        how = {"solver": Euler(), "grid": Uniform(), "nfe": settings.nfe, "t_max": cfg.t_max}
        size = cfg.evaluation.batch_size
        return sample_straightness(run.velocity(cfg), x1, label=label, batch_size=size, **how)[1].mean().item()

    return once(make, "straightness", run.hash, settings, seed, cfg.t_max, cfg.precision)


def measure(cfg: DictConfig, run: Teacher, rows: Vectors, cost: Cost) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The metrics of a cell, from what was measured of each sample, and the bootstrap values by which cells are compared."""
    found, name, resamples = column(cfg, rows, "features"), distance_name(cfg), Resamples(cfg)
    if len(found) <= found.shape[1]:
        warn_of_few(*found.shape)
    real = reference(cfg)
    resamples.distance(name, real.reference.linearise(found))
    if cfg.teacher.path is not None:
        against_teacher(cfg, found, column(cfg, rows, "paired").all().double(), resamples)
    also = scores.measure(
        parts.plain(cfg.evaluation.metrics), found, column(cfg, rows, "logits"), real.features, feature_network(cfg)
    )
    about = {
        "num_images": cfg.evaluation.num_images,
        "floor": real.floor,
        "straightness": flow_straightness(cfg, run),
        "device": parts.device_name(cfg),
        **cost._asdict(),
        **resamples.values,
        **also,
        "distance": name,
        "scores": list(also),
        "intervals": resamples.intervals(),
        "protocol": protocol(cfg, run),
    }
    return about, {name: vector.tolist() for name, vector in resamples.vectors.items()}


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

    def beyond(self, name: str, other: str, base: Linearised) -> None:
        """How far a distance that is there, `other`, lies above that of other samples of the same noise."""
        self.values[name] = self.values[other] - base.distance
        self.vectors[name] = self.vectors[other] - linear_bootstrap(*base, *self.how)

    def mean(self, name: str, per_sample: Tensor) -> None:
        """The mean of per-sample values (n,)."""
        self.values[name] = per_sample.double().mean().item()
        self.vectors[name] = mean_bootstrap(per_sample, *self.how)

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals over the held-out noise, [low, high]."""
        found = {name: interval(value, self.vectors[name]) for name, value in self.values.items()}
        return {name: [low, high] for name, (_, _, low, high) in found.items()}


def against_teacher(cfg: DictConfig, found: Vectors, paired: Tensor, resamples: Resamples) -> None:
    """The distances to the teacher's samples of the same noise: as sets, in pixels, by frequency band, in features.

    `_added` is the distance to the data less the teacher's own: the bias that rectifications and few steps add to the teacher's.
    """
    teacher, name = teacher_samples(cfg), distance_name(cfg)
    own = teacher.reference.linearise(found, teacher.features)
    resamples.distance(name + TEACHER, own)
    resamples.beyond(name + ADDED, name, teacher_distance(cfg))
    resamples.mean(PAIRED, paired[:, 0].sqrt())
    if is_images(cfg):
        for band, values in zip(BANDS, paired[:, 1:].unbind(1), strict=True):
            resamples.mean(f"paired_mse_{band}", values)
        apart = torch.cat([feature_distance(*chunk) for chunk in zip(found, teacher.features, strict=True)])
        resamples.mean(f"paired_{feature_network(cfg).name}", apart)
