"""The verb `pairs`: draw a teacher's pairs, backward (noise to image) and forward (image to noise), into a store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from .. import parts
from ..artifacts import Artifact, artifact
from ..data.sets import SampleSet
from ..data.sources import DataSource
from ..errors import bad_value, require
from ..flow import MeanVelocity
from ..inf.sampler import invert, sample
from ..networks.precision import require_precision
from ..noise import Indices, chunks
from ..progress import track
from .store import DTYPES, PairStore, is_whole, pair_labels, pair_noise, shard_name, write_manifest, write_shard

VERSION = 1  #: of the recipe: increment when the same configuration means another result


def pairs(cfg: DictConfig) -> Path:
    """Make the store that `pairs.kind` names, or finish it, or return at once if it is whole."""
    parts.check(cfg)
    store = ensure(cfg, cfg.pairs.kind)
    print(f"pairs: {store.folder} ({len(store):,} {store.kind} pairs)")
    return store.folder


def plan(cfg: DictConfig, kind: str, num_pairs: int | None = None, seed: int | None = None) -> Artifact:
    """The artifact of a store: its recipe is the manifest's provenance, so that equal stores have one folder."""
    require(kind in ("backward", "forward"), "pairs.kind", kind, "allowed: backward, forward")
    require_precision(cfg.precision)
    teacher, source = parts.teacher(cfg), parts.data_source(cfg)
    count = cfg.pairs[f"num_{kind}"] if num_pairs is None else num_pairs
    check(cfg, kind, count, source)
    recipe = {
        "kind": kind,
        "count": count,
        "shape": list(parts.sample_shape(source)),
        "num_classes": teacher.num_classes,
        "teacher": teacher.hash,
        "solver": parts.plain(cfg.pairs.solver),
        "grid": parts.plain(cfg.pairs.grid),
        "nfe": cfg.pairs.nfe,
        "t_max": teacher.t_max,
        "seed": cfg.pairs.seed if seed is None else seed,
        "batch_size": cfg.pairs.batch_size,
        "shard_size": cfg.pairs.shard_size,
        "dtype": cfg.pairs.dtype,
        "precision": cfg.precision,
        "data": source.split("train").content_hash if kind == "forward" else None,
    }
    return artifact(cfg.outputs, "pairs", VERSION, **recipe)


def check(cfg: DictConfig, kind: str, count: int, source: DataSource) -> None:
    """Raise a `UserError` for settings under which a store could not be made, or not twice the same."""
    images = source.split("train")
    whole = {f"num_{kind}": count, **{key: cfg.pairs[key] for key in ("nfe", "batch_size", "shard_size")}}
    for key, value in whole.items():
        parts.require_whole(f"pairs.{key}", value, 1)
    parts.require_whole("pairs.seed", cfg.pairs.seed, 0)
    fits = kind == "backward" or count <= len(images)
    require(fits, "pairs.num_forward", count, f"at most the number of training images, {len(images)}")
    solver = cfg.pairs.solver
    require(
        instantiate(solver).fixed_step, "pairs.solver", solver._target_, "must be a fixed-step solver: a store is reproducible"
    )
    require(cfg.pairs.dtype in DTYPES, "pairs.dtype", cfg.pairs.dtype, f"allowed: {', '.join(DTYPES)}")
    in_bytes = kind == "backward" and len(images.shape) == 3
    require(
        cfg.pairs.dtype != "uint8" or in_bytes,
        "pairs.dtype",
        "uint8",
        "holds images only: noise and points want float16 or float32",
    )


def ensure(cfg: DictConfig, kind: str, num_pairs: int | None = None, seed: int | None = None) -> PairStore:
    """The store of a kind, generated first if it is not there; `num_pairs` and `seed` stand in for the configured ones."""
    made = plan(cfg, kind, num_pairs, seed)
    images = parts.data_source(cfg).split("train")
    with made.locked():
        if not made.is_done():
            made.begin()
            generate(cfg, made, images)
            made.finish()
    return PairStore(made.folder, images)


def generate(cfg: DictConfig, made: Artifact, images: SampleSet) -> None:
    """Fill the folder shard by shard; whole shards of an earlier, interrupted run are kept."""
    recipe, velocity = made.recipe, parts.teacher(cfg).velocity(cfg)
    starts = range(0, recipe["count"], recipe["shard_size"])
    counts = [min(recipe["shard_size"], recipe["count"] - start) for start in starts]
    like = (*recipe["shape"],), recipe["dtype"]
    missing = [i for i, count in enumerate(counts) if not is_whole(made.folder / shard_name(i), count, *like)]
    done = sum(counts) - sum(counts[i] for i in missing)

    def work() -> Iterator[int]:
        for i in missing:
            drawn: list[Tensor] = []
            for chunk in solve(velocity, recipe, images, np.arange(starts[i], starts[i] + counts[i]), parts.device(cfg)):
                drawn.append(chunk)
                yield len(chunk)
            write_shard(made.folder / shard_name(i), torch.cat(drawn), recipe["dtype"])

    for _ in track(work(), f"{recipe['kind']} pairs", sum(counts), "pairs", done):
        pass
    write_manifest(made.folder, recipe, counts)


def solve(
    velocity: MeanVelocity, recipe: dict[str, Any], images: SampleSet, indices: Indices, device: torch.device
) -> Iterator[Tensor]:
    """The stored half of these pairs, batch by batch on the CPU: x0 of backward pairs, x1 of forward ones."""
    settings = {
        "solver": instantiate(recipe["solver"]),
        "grid": instantiate(recipe["grid"]),
        "nfe": recipe["nfe"],
        "t_max": recipe["t_max"],
    }
    for chunk in chunks(indices, recipe["batch_size"]):
        if recipe["kind"] == "backward":
            x1 = pair_noise(recipe["seed"], chunk, tuple(recipe["shape"])).to(device)
            label = pair_labels(recipe["seed"], chunk, recipe["num_classes"])
            result = sample(velocity, x1, label=None if label is None else label.to(device), **settings)
        else:
            x0, label = images.take(chunk, device)
            result = invert(velocity, x0, label=label if recipe["num_classes"] else None, **settings)
        if not result.isfinite().all():
            reason = f"the teacher made NaN or infinite values among pairs {chunk[0]} to {chunk[-1]}"
            raise bad_value("pairs", recipe["kind"], reason)
        yield result.cpu()
