"""The verb `pairs`: a store of a teacher's pairs, backward (noise to image) or forward (image to noise), or of projected ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from .. import filling, parts, tracking
from ..artifacts import Artifact, artifact
from ..data.sets import SampleSet, moved
from ..data.sources import DataSource, has_pixels
from ..errors import UserError, require
from ..flow import MeanVelocity
from ..inf.sampler import invert, require_suited, sample
from ..networks.precision import require_precision
from ..noise import Indices, chunks, normal
from ..parallel import rank, take_own_gpu
from ..parts import Teacher
from ..shards import DTYPES
from . import projected
from .store import PairStore, fill, pair_images, pair_labels, pair_noise

VERSION = 3  #: of the recipe: increment when the same configuration means another result
HALF = {"backward": "x0", "forward": "x1"}  #: the half of a drawn pair that is stored
KINDS = (*HALF, "projected")
START_STREAM = "pairs/start"  #: the noise that forward pairs may start with


def pairs(cfg: DictConfig) -> Path:
    """Make the store that `pairs.kind` names, or finish it, or return at once if it is whole; alone or with other processes."""
    parts.check(cfg)
    take_own_gpu()
    made = plan(cfg, cfg.pairs.kind)
    total = -(-made.recipe["count"] // made.recipe["shard_size"])
    wanted = wanted_shards(cfg, total)
    try:
        whole = make(cfg, made, wanted)
    except KeyboardInterrupt:
        print(f"stopped; whole shards are kept in {made.folder}, and the same command goes on")
        raise
    there = len(list(made.folder.glob("shard-*.npy")))
    state = f"{made.recipe['count']:,} {cfg.pairs.kind} pairs" if whole else f"unfinished: {there} of {total} shards are there"
    if rank() == 0:
        print(f"pairs: {made.folder} ({state})")
    if whole:
        tracking.stored(cfg, made.folder)
    return made.folder


def plan(cfg: DictConfig, kind: str, num_pairs: int | None = None, seed: int | None = None) -> Artifact:
    """The artifact of a store: its recipe stands in the manifest, and equal recipes have one folder."""
    require(kind in KINDS, "pairs.kind", kind, f"allowed: {', '.join(KINDS)}")
    require_precision(cfg.precision)
    if kind == "projected":
        return in_own_folder(cfg, kind, projected.plan(cfg, plan(cfg, projected_from(cfg))))
    teacher, source = parts.teacher(cfg), parts.data_source(cfg)
    count = cfg.pairs[f"num_{kind}"] if num_pairs is None else num_pairs
    check(cfg, kind, count, source)
    forward = kind == "forward"
    is_random = not forward or cfg.pairs.start_noise
    recipe = {
        "kind": kind,
        "half": HALF[kind],
        "count": count,
        "shape": list(parts.sample_shape(source)),
        **drawing(cfg, teacher),
        "seed": None if not is_random else cfg.pairs.seed if seed is None else seed,
        "batch_size": cfg.pairs.batch_size,
        "shard_size": cfg.pairs.shard_size,
        "dtype": cfg.pairs.dtype,
        "data": source.split("train").content_hash if forward else None,
        "flips": cfg.pairs.flips if forward else False,
        "start_noise": cfg.pairs.start_noise if forward else False,
    }
    made = artifact(cfg.outputs, "pairs", VERSION, **recipe)
    return made if num_pairs is not None or seed is not None else in_own_folder(cfg, kind, made)


def in_own_folder(cfg: DictConfig, kind: str, made: Artifact) -> Artifact:
    """The store where `pairs.folder` wants it."""
    return made if cfg.pairs.folder is None else Artifact(Path(cfg.pairs.folder) / kind, made.recipe)


def projected_from(cfg: DictConfig) -> str:
    """The kind of store that projected pairs come from."""
    kind = cfg.pairs.projected_from
    require(kind in HALF, "pairs.projected_from", kind, f"allowed: {', '.join(HALF)}")
    return str(kind)


def drawing(cfg: DictConfig, teacher: Teacher) -> dict[str, Any]:
    """How a teacher's pairs are drawn, stored or online."""
    return {
        "teacher": teacher.hash,
        "num_classes": teacher.num_classes,
        "solver": parts.plain(cfg.pairs.solver),
        "grid": parts.plain(cfg.pairs.grid),
        "nfe": cfg.pairs.nfe,
        "t_max": teacher.t_max,
        "guidance": parts.guidance(cfg, teacher, "pairs.guidance").recipe,
        "precision": cfg.precision,
    }


def require_solver(cfg: DictConfig) -> None:
    """Raise a `UserError` for an adaptive solver, whose pairs could not be drawn twice, and for jumps of a velocity."""
    solver = instantiate(cfg.pairs.solver)
    reason = "must be a fixed-step solver: a store is reproducible"
    require(solver.fixed_step, "pairs.solver", cfg.pairs.solver._target_, reason)
    require_suited(solver, parts.teacher(cfg).description, instantiate(cfg.pairs.guidance), "pairs")


def check(cfg: DictConfig, kind: str, count: int, source: DataSource) -> None:
    """Raise a `UserError` for settings under which a store could not be made, or not twice the same."""
    images = source.split("train")
    whole = {f"num_{kind}": count, **{key: cfg.pairs[key] for key in ("nfe", "batch_size", "shard_size")}}
    for key, value in whole.items():
        parts.require_whole(f"pairs.{key}", value, 1)
    parts.require_whole("pairs.seed", cfg.pairs.seed, 0)
    for key in ("flips", "start_noise"):
        require(isinstance(cfg.pairs[key], bool), f"pairs.{key}", cfg.pairs[key], "must be true or false")
    require_solver(cfg)
    are_images = has_pixels(source)
    require(are_images or not cfg.pairs.flips, "pairs.flips", True, "points have no left and right, latents are not mirrored")
    require(cfg.pairs.dtype in DTYPES, "pairs.dtype", cfg.pairs.dtype, f"allowed: {', '.join(DTYPES)}")
    bytes_fit = cfg.pairs.dtype != "uint8" or (kind == "backward" and are_images)
    require(bytes_fit, "pairs.dtype", "uint8", "holds images only: noise, points and latents want float16 or float32")
    distinct = len(images) * (1 + cfg.pairs.flips)
    repeats = f"only {distinct} differ (training images, flips counted); pairs.start_noise=true makes each repeat another pair"
    require(kind != "forward" or count <= distinct or cfg.pairs.start_noise, "pairs.num_forward", count, repeats)


def wanted_shards(cfg: DictConfig, total: int) -> range | None:
    """The shards, of `total`, that `pairs.shards` names, `first:end`; None for all of them."""
    text = cfg.pairs.shards
    if text is None:
        return None
    first, _, end = str(text).partition(":")
    good = first.isdigit() and end.isdigit() and int(first) < int(end)
    require(good, "pairs.shards", text, "must be first:end, e.g. 0:10 for the shards 0 to 9")
    require(int(end) <= total, "pairs.shards", text, f"the store has the shards 0:{total}")
    return range(int(first), int(end))


def ensure(cfg: DictConfig, kind: str, num_pairs: int | None = None, seed: int | None = None) -> PairStore:
    """The store of a kind, generated first if it is not there; `num_pairs` and `seed` stand in for the configured ones."""
    made = plan(cfg, kind, num_pairs, seed)
    make(cfg, made)
    return PairStore(made.folder, parts.data_source(cfg).split("train"))


def make(cfg: DictConfig, made: Artifact, numbers: range | None = None) -> bool:
    """Generate what is missing of a store, or of these shards of it; whether all of it is there now."""
    made.require_recipe()
    if is_done(made):
        return True
    origin = {"teacher_path": str(cfg.teacher.path), "teacher_profile": cfg.teacher.profile, "data": located(cfg)}
    if made.recipe["kind"] == "projected":
        return projected.make(cfg, made, ensure(cfg, projected_from(cfg)), origin, numbers)
    images, device, teacher = parts.data_source(cfg).split("train"), parts.device(cfg), parts.teacher(cfg)
    velocity = parts.velocity(cfg, teacher, "pairs.guidance")
    origin |= parts.guidance(cfg, teacher, "pairs.guidance").origin

    def draw(indices: Indices) -> Iterator[Tensor]:
        return solve(velocity, made.recipe, images, indices, device)

    return fill(made, draw, filling.conditions(device, **origin), numbers)


def is_done(made: Artifact) -> bool:
    """Whether a store is finished; the error for a damaged one says how to draw no more than that shard again."""
    try:
        return made.is_done()
    except UserError as error:
        hint = "or, of a shard, delete the shard and done.json to draw only that again"
        raise UserError(f"{error}, {hint}" if "shard-" in str(error) else str(error)) from None


def located(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of the data set, from which another process finds it again: a path made absolute."""
    data: dict[str, Any] = parts.plain(cfg.data)
    return data | {key: str(Path(data[key]).absolute()) for key in ("path", "floor", "cache") if data.get(key)}


def solve(
    velocity: MeanVelocity, recipe: dict[str, Any], images: SampleSet, indices: Indices, device: torch.device
) -> Iterator[Tensor]:
    """The stored half of these pairs on the device, batch by batch: x0 of backward pairs, x1 of forward ones."""
    rules = {"solver": instantiate(recipe["solver"]), "grid": instantiate(recipe["grid"])}
    rules |= {key: recipe[key] for key in ("nfe", "t_max")}
    starts = (start(recipe, images, chunk, device) for chunk in chunks(indices, recipe["batch_size"]))
    for x, label, noise in filling.ahead(starts) if device.type == "cuda" else starts:
        if recipe["kind"] == "backward":
            yield sample(velocity, x, label=label, **rules)
        else:
            yield invert(velocity, x, label=label, start_noise=noise, **rules)


def start(
    recipe: dict[str, Any], images: SampleSet, indices: Indices, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What these pairs are integrated from: the derived half, the labels, and the noise that forward pairs may start with."""
    seed, shape, classes = recipe["seed"], tuple(recipe["shape"]), recipe["num_classes"]
    if recipe["kind"] == "backward":
        x, label = pair_noise(seed, indices, shape), pair_labels(seed, indices, classes)
    else:
        x, label = pair_images(images, indices, recipe["flips"])
    noise = normal(seed, START_STREAM, indices, shape) if recipe["start_noise"] else None
    label, noise = (None if part is None else moved(part, device) for part in (label if classes else None, noise))
    return moved(x, device), label, noise
