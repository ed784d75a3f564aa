"""What samples are measured against: real images, the teacher's own samples of the same noise, in the features of one network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from .. import parts
from ..artifacts import Artifact, file_hash
from ..data.sources import Encoded, decoded
from ..errors import require
from ..lrn import pairs
from ..lrn.store import PairStore
from ..noise import Indices, chunks
from . import reference as real_statistics
from . import vectors
from .features import FeatureNetwork, PointFeatures, identity
from .frechet import Linearised, Reference
from .metrics import PUBLISHED_INCEPTION
from .vectors import Vectors

FID_IMAGES = 50_000  #: what the field's convention asks for


def teacher_samples_plan(cfg: DictConfig) -> Artifact:
    """The store of the teacher's many-step samples of the held-out noise: backward pairs of another seed."""
    seed = cfg.evaluation.seed
    return pairs.plan(cfg, "backward", cfg.evaluation.num_images, seed)


def is_images(cfg: DictConfig) -> bool:
    """Whether the data are images; points have no resolution."""
    return "resolution" in cfg.data


def feature_network(cfg: DictConfig) -> FeatureNetwork:
    """What turns samples into features: a network for images; points are their own."""
    made: FeatureNetwork = instantiate(cfg.evaluation.features) if is_images(cfg) else PointFeatures(cfg.data.dim)
    return made


def distance_name(cfg: DictConfig) -> str:
    """What the Fréchet distance is called: by its features. A FID is Inception's, of 50,000 rounded images, of a whole set."""
    network = feature_network(cfg)
    enough = cfg.evaluation.num_images == FID_IMAGES and is_whole(cfg)
    is_fid = network.name == PUBLISHED_INCEPTION and enough and network.settings["rounding"]
    return "fid" if is_fid else f"fd_{network.name}"


def is_whole(cfg: DictConfig) -> bool:
    """Whether the reference stands for a whole data set; beside latents only some of the original images may be kept."""
    source, wanted = parts.data_source(cfg), cfg.evaluation.reference
    some = wanted == "all" and isinstance(source, Encoded) and len(source.split("reference")) < len(source.split("train"))
    return wanted is not None and not some


def features(cfg: DictConfig, samples: Tensor) -> Tensor:
    """What distances are taken of, float32 (n, d) on the CPU, computed on the configured device."""
    return feature_network(cfg)(looked_at(cfg, samples) if is_images(cfg) else samples)


def looked_at(cfg: DictConfig, samples: Tensor) -> Tensor:
    """Images, latents decoded, on the configured device."""
    return decoded(parts.data_source(cfg), samples.to(parts.device(cfg)))


def features_of(cfg: DictConfig, what: str, content: str, num: int, take: Callable[[Indices], Tensor]) -> Vectors:
    """The features of the first `num` of some samples, kept for the next command.

    what: their name, for people. content: a hash of them. take: of indices, those samples.
    """
    network, size = feature_network(cfg), cfg.evaluation.batch_size
    made = vectors.plan(cfg.outputs, num, network.num_features, size, samples=content, features=identity(network))

    def draw(indices: Indices) -> Iterator[Tensor]:
        return (features(cfg, take(chunk)) for chunk in chunks(indices, size))

    return vectors.fill(made, draw, parts.device(cfg), f"{network.name} of {what}")


def split_features(cfg: DictConfig, name: str) -> Vectors:
    """The features of the first samples of a split, as many as are generated."""
    split = parts.data_source(cfg).split(name)
    return features_of(cfg, name, split.content_hash, cfg.evaluation.num_images, lambda indices: split.take(indices)[0])


_SHARED: dict[str, Any] = {}


def once(make: Callable[[], Any], *key: object) -> Any:
    """What the cells of a study share, made once a process; the key holds all that it depends on."""
    name = " ".join(map(str, key))
    if name not in _SHARED:
        _SHARED[name] = make()
    return _SHARED[name]


class Real(NamedTuple):
    """What samples are measured against; features of real samples, (n, d), where the metrics that need them can be had.

    `floor` is the distance of as many other real samples, where there are so many.
    """

    reference: Reference
    features: Vectors | Tensor | None
    floor: float | None


def about_reference(cfg: DictConfig) -> dict[str, Any]:
    """What samples are measured against, by its content: real images, so many of the split, or a file of statistics."""
    wanted, split = cfg.evaluation.reference, parts.data_source(cfg).split("reference")
    if wanted is None:
        return {"images": split.content_hash, "num_images": cfg.evaluation.num_images}
    if wanted == "all":
        return {"images": split.content_hash, "num_images": len(split)}
    there = isinstance(wanted, str) and Path(wanted).is_file()
    require(there, "evaluation.reference", wanted, "no such file; null, all, or statistics of EDM (.npz) or EDM2 (.pkl)")
    return {"statistics": file_hash(Path(wanted)), "num_images": None}


def reference(cfg: DictConfig) -> Real:
    """The real samples to measure against, and the floor."""
    split = parts.data_source(cfg).split("floor")
    key = (about_reference(cfg), split.content_hash, cfg.evaluation.num_images, identity(feature_network(cfg)))
    return once(lambda: real(cfg), "reference", *key)


def real(cfg: DictConfig) -> Real:
    """See `reference`; statistics of a whole split are kept beside the other artifacts."""
    num, wanted = cfg.evaluation.num_images, cfg.evaluation.reference
    source, network = parts.data_source(cfg), feature_network(cfg)
    images = source.split("reference")
    found: Vectors | Tensor | None = None
    if wanted is None:
        found = split_features(cfg, "reference")
        reference = Reference.of(found)
    elif wanted == "all":
        kept = real_statistics.cached(cfg.outputs, images, network, num if cfg.evaluation.metrics else 0, parts.device(cfg))
        found, reference = kept.features, Reference.given(*kept.statistics)
    else:
        reference = Reference.given(*statistics_in(Path(wanted), network))
    floor = reference.distance(split_features(cfg, "floor")) if len(source.split("floor")) >= num else None
    return Real(reference, found, floor)


def statistics_in(path: Path, network: FeatureNetwork) -> real_statistics.Statistics:
    """The statistics of a file, which must be of as many dimensions as the features."""
    found = real_statistics.read(path, "fd_dinov2" if network.name.startswith("dinov2") else "fid")
    dims, named = len(found.mean), f"{network.name}'s features have {network.num_features} dimensions"
    require(dims == network.num_features, "evaluation.reference", path, f"has {dims} dimensions, {named}")
    return found


class TeacherSamples(NamedTuple):
    """The teacher's many-step samples of the held-out noise, with their features."""

    store: PairStore
    features: Vectors
    reference: Reference


def teacher_samples(cfg: DictConfig) -> TeacherSamples:
    """Generated first if they are missing."""

    def make() -> TeacherSamples:
        store = pairs.ensure(cfg, "backward", cfg.evaluation.num_images, cfg.evaluation.seed)
        found = features_of(cfg, "the teacher's", key, len(store), store.stored)
        return TeacherSamples(store, found, Reference.of(found))

    key = teacher_samples_plan(cfg).key
    return once(make, "teacher", key, identity(feature_network(cfg)))


def teacher_distance(cfg: DictConfig) -> Linearised:
    """The distance of the teacher's many-step samples to the data: what a perfect student has."""
    key = (teacher_samples_plan(cfg).key, about_reference(cfg), identity(feature_network(cfg)))
    return once(lambda: reference(cfg).reference.linearise(teacher_samples(cfg).features), "teacher to data", *key)
