"""Projected pairs as a store: another store, with its stored half moved onto the marginal that it misses (improvement 5).

The half that is derived is right by construction, a backward pair's noise and a forward pair's image, and stays as it is.
The map is fitted to the training split and judged on others; it lies in the store, so that shards are moved one by one.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import filling, parts
from ..artifacts import Artifact, artifact, write_atomically
from ..data.sets import SampleSet
from ..data.sources import DataSource, Encoded
from ..errors import UserError, require
from ..evaluation.features import FeatureNetwork
from ..evaluation.frechet import Reference
from ..noise import Indices, batch_indices, chunks, normal
from .projection import Distance, HeldOut, Method, Projection, Round, Side, fit, sliced_w2_squared, w2_squared_exact
from .store import PairStore, fill

VERSION = 2  #: of the recipe: increment when the same configuration means another result
MAP = "projection.safetensors"  #: the fitted map, in the store's folder
NUM_JUDGED = 2000  #: held-out pairs, and as many of the data, by which a map is judged
STREAM = "projection"


def plan(cfg: DictConfig, source: Artifact) -> Artifact:
    """The artifact of a projected store: its source's recipe, and how it is projected."""
    method = instantiate(cfg.projection)
    require(isinstance(method, Method), "projection", cfg.projection, "must be a member of the group projection")
    held = parts.data_source(cfg)
    require(not isinstance(held, Encoded), "pairs.kind", "projected", "is not for latents: images judge a projection")
    splits = ("train", "reference", "floor") if source.recipe["half"] == "x0" else ()
    spare = all(len(held.split(name)) for name in splits)
    require(spare, "data", held.split("train").name, "has no held-out images (split floor), which judge a projection of images")
    recipe = {
        **{key: value for key, value in source.recipe.items() if key not in ("stage", "version")},
        "kind": "projected",
        "source": source.key,
        "projection": parts.plain(cfg.projection),
        "projection_seed": cfg.pairs.seed,
        "targets": {name: held.split(name).content_hash for name in splits},
        "dtype": "float16" if source.recipe["dtype"] == "uint8" else source.recipe["dtype"],
    }
    return artifact(cfg.outputs, "pairs", VERSION, **recipe)


def make(cfg: DictConfig, made: Artifact, source: PairStore, origin: dict[str, Any], numbers: range | None = None) -> bool:
    """Fit the map, or go on after its last finished round, then move what is missing; whether the store is whole."""
    device = parts.device(cfg)
    with made.locked():
        if made.is_done():
            return True
        made.begin()
        marginal = marginal_of(cfg, source, source.manifest["half"])
        projection = fitted(made.folder / MAP, instantiate(cfg.projection), marginal.side(device), device)

    def draw(indices: Indices) -> Iterator[Tensor]:
        return moved(projection, source, indices, made.recipe["batch_size"], device)

    more = {"source_folder": str(source.folder.absolute()), "projection": found(cfg, source, projection)}
    return fill(made, draw, filling.conditions(device, **origin, **more), numbers)


@dataclass(frozen=True)
class Marginal:
    """One half of a store's pairs beside the law it should have: data for x0, N(0, I) for x1.

    The last `num_judged` pairs are kept from fitting and judged against held-out data or noise: points by the exact W2^2,
    images by the Fréchet distance of their Lite0 features, their noise by the sliced W2^2.
    """

    source: PairStore
    half: str
    data: DataSource
    seed: int
    features: FeatureNetwork

    @property
    def num_judged(self) -> int:
        """As many as NUM_JUDGED, but no more than a quarter of the pairs, or than the held-out data has."""
        splits = [len(self.split(name)) for name in ("reference", "floor")]
        return max(2, min(NUM_JUDGED, len(self.source) // 4, *splits))

    @property
    def metric(self) -> str:
        """The name of the distance."""
        if len(self.source.manifest["shape"]) == 1:
            return "w2_squared"
        return f"fd_{self.features.name}" if self.half == "x0" else "sliced_w2_squared"

    def split(self, name: str) -> SampleSet:
        """A split of the data."""
        return self.data.split(name)

    def distance(self) -> Distance:
        """Between samples and samples of the law."""
        if self.metric == "w2_squared":
            return w2_squared_exact
        if self.metric == "sliced_w2_squared":
            return lambda x, _: sliced_w2_squared(x)
        reference = functools.lru_cache(maxsize=1)(lambda target: Reference.of(self.features(target)))
        return lambda x, target: reference(target).distance(self.features(x))

    def samples(self, indices: Indices) -> Tensor:
        """This half of the source's pairs."""
        stored = self.half == self.source.manifest["half"]
        return self.source.stored(indices) if stored else self.source.derived(indices)

    def law(self, split: str, indices: Indices) -> tuple[Tensor, Tensor | None]:
        """Samples of the law: images of a split, or noise of a stream of that name, with classes where the pairs have them."""
        about = self.source.manifest
        if self.half == "x0":
            x, label = self.split(split).take(indices % len(self.split(split)))
            return x, label if about["num_classes"] else None
        stream = f"{STREAM}/{split}"
        x = normal(self.seed, stream, indices, tuple(about["shape"]))
        return x, self.source.labels(indices % len(self.source)) if about["num_classes"] else None

    def judged(self) -> Indices:
        """The pairs that judge."""
        return np.arange(len(self.source) - self.num_judged, len(self.source))

    def heldout(self) -> HeldOut:
        """The pairs that judge, and two draws of the law."""
        last, first = self.judged(), np.arange(self.num_judged)
        (target, _), (other, _) = (self.law(name, first) for name in ("floor", "reference"))  # evaluation measures by reference
        return HeldOut(self.samples(last), self.source.labels(last), target, other, self.distance())

    def side(self, device: torch.device) -> Side:
        """What a map of this half is fitted to, on the device, and judged by."""
        about, size = self.source.manifest, len(self.source) - self.num_judged
        size_of_law = len(self.split("train")) if self.half == "x0" else 2**40

        def drawn(step: int, num: int) -> tuple[Tensor, Tensor | None]:
            indices = batch_indices(self.seed, f"{STREAM}/source", step, num, size)
            return on(device, self.samples(indices), self.source.labels(indices))

        def target(step: int, num: int) -> tuple[Tensor, Tensor | None]:
            in_order = np.arange(step * num, (step + 1) * num)
            at_random = self.half == "x0"
            indices = batch_indices(self.seed, f"{STREAM}/target", step, num, size_of_law) if at_random else in_order
            return on(device, *self.law("train", indices))

        return Side(drawn, target, self.heldout(), self.seed, int(about["num_classes"]))


def marginal_of(cfg: DictConfig, source: PairStore, half: str) -> Marginal:
    """The marginal of a store under a configuration."""
    return Marginal(source, half, parts.data_source(cfg), cfg.pairs.seed, instantiate(cfg.evaluation.features))


def on(device: torch.device, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both on the device."""
    return x.to(device), None if label is None else label.to(device)


def found(cfg: DictConfig, source: PairStore, projection: Projection) -> dict[str, Any]:
    """What the manifest says of a map: lam_proj reached, how far it moved, its rounds, both marginals before and after."""
    first, last = projection.rounds[0], projection.reached
    half = source.manifest["half"]
    other = "x1" if half == "x0" else "x0"
    ours, theirs = marginal_of(cfg, source, half), marginal_of(cfg, source, other)
    heldout = theirs.heldout()
    unmoved = heldout.distance(heldout.x, heldout.target)
    marginals = {
        half: {"metric": ours.metric, "before": first.distance, "after": last.distance, "floor": first.floor},
        other: {"metric": theirs.metric, "before": unmoved, "after": unmoved, "floor": heldout.floor},
    }
    summary = {"lam_proj": last.lam_proj, "displacement": last.displacement, "num_judged": ours.num_judged}
    return {**summary, "marginals": marginals, "rounds": [r._asdict() for r in projection.rounds]}


def fitted(path: Path, method: Method, side: Side, device: torch.device) -> Projection:
    """The map, saved after every round, from which a killed process goes on."""
    begun = load(path, method, device) if path.exists() else None
    rounds = fit(method, side, begun)
    for made in rounds:
        save(made, path)
        last = made.rounds[-1]
        state = f"distance {last.distance:.4g} (floor {last.floor:.4g}), moved by {last.displacement:.4g}"
        print(f"projection: lam_proj {last.lam_proj:g}, {state}{'' if last.kept else ', not kept'}")
    ended = load(path, method, device)
    print(f"projection: ended, {why(method, ended)}")
    return ended


def why(method: Method, ended: Projection) -> str:
    """Why lam_proj rises no further."""
    last = ended.rounds[-1]
    if not last.kept:
        return "the marginal came no nearer"
    return (
        "the marginal is met" if last.distance <= method.tolerance * last.floor else "lam_max is reached, the marginal is not met"
    )


def save(made: Projection, path: Path) -> None:
    """Write a map with its rounds, atomically."""
    metadata = {"rounds": json.dumps([r._asdict() for r in made.rounds])}
    write_atomically(path, lambda p: save_file(made.state(), p, metadata))


def load(path: Path, method: Method, device: torch.device) -> Projection:
    """Read a map; a damaged file is a user's error that names it."""
    try:
        with safe_open(path, "pt") as file:
            rounds = [Round(**r) for r in json.loads((file.metadata() or {})["rounds"])]
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return method.load(state, rounds, device)
    except Exception as error:
        raise UserError(f"{path}: not a whole projection ({str(error)[:60]}); delete {path.parent} to make it again") from None


def moved(made: Projection, source: PairStore, indices: Indices, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """The stored half of these pairs where the map carries it, batch by batch."""
    for chunk in chunks(indices, batch_size):
        label = source.labels(chunk)
        yield made(source.stored(chunk).to(device), None if label is None else label.to(device))
