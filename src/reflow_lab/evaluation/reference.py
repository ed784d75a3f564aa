"""Statistics of real images, computed once for a data set and a feature network, and kept; EDM's files of them.

A cached reference is an artifact, outputs/reference/KEY, named by the content of the images and the identity of the features
(network, weight hash, settings): other images or other weights make another folder, so that stale statistics are never read.
It holds statistics.npz (in EDM's format: mu, sigma) and, for the metrics that need samples, features.npy.
"""

import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..artifacts import Artifact, artifact, write_atomically
from ..data.sets import SampleSet
from ..errors import UserError
from ..networks import pickles
from ..noise import permutation
from ..progress import Bar
from .features import FeatureNetwork, identity
from .frechet import Moments

VERSION = 1  #: of the recipe: increment when the same configuration means another result
BATCH = 256  #: images gathered at a time
SYMMETRY = 1e-6  #: largest asymmetry of a covariance that passes for rounding, relative to its largest entry


class Statistics(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d), float64: all that a Fréchet distance needs of a data set."""

    mean: Tensor
    cov: Tensor


class Cached(NamedTuple):
    """A reference as it is kept: its key, its statistics, and features, float32 (n, d), of images in random order."""

    key: str
    statistics: Statistics
    features: Tensor


def plan(outputs: str | Path, images: SampleSet, network: FeatureNetwork, num_features: int = 0) -> Artifact:
    """The artifact of a data set's statistics under a network, with the features of `num_features` images beside them."""
    made = {"data": images.content_hash, "features": identity(network), "num_images": len(images)}
    return artifact(outputs, "reference", VERSION, **made, num_features=min(num_features, len(images)))


def cached(
    outputs: str | Path, images: SampleSet, network: FeatureNetwork, num_features: int = 0, device: torch.device | None = None
) -> Cached:
    """The statistics of all images, computed if nobody has yet; processes that want the same ones wait for the first.

    num_features: how many images' features are kept for the metrics that compare samples. They are taken in a random order
    that does not depend on this number, so that the first n are a sample of the data set for every n.
    """
    made = plan(outputs, images, network, num_features)
    with made.locked():
        if not made.is_done():
            made.begin()
            _fill(made, images, network, device)
            made.finish()
    features = np.load(made.folder / "features.npy", allow_pickle=False)
    return Cached(made.key, read(made.folder / "statistics.npz"), torch.from_numpy(features))


def _fill(made: Artifact, images: SampleSet, network: FeatureNetwork, device: torch.device | None) -> None:
    order = permutation(0, "reference", len(images))
    moments, kept, wanted = Moments.of(torch.empty(0, network.num_features)), [], made.recipe["num_features"]
    with Bar(f"reference {network.name}", len(images), "images") as bar:
        for first in range(0, len(order), BATCH):
            features = network(images.take(order[first : first + BATCH], device)[0])
            moments += Moments.of(features)
            kept.append(features[: max(wanted - first, 0)].numpy())
            bar.advance(len(features))
    write_npz(made.folder / "statistics.npz", Statistics(moments.mean, moments.cov))
    np.save(made.folder / "features.npy", np.concatenate(kept), allow_pickle=False)


def write_npz(path: Path, statistics: Statistics) -> None:
    """Write statistics as EDM's fid.py reads them: arrays mu (d,) and sigma (d, d), float64."""
    mean, cov = (tensor.numpy() for tensor in statistics)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, mu=mean, sigma=cov)

    write_atomically(path, save)


def read(path: Path, metric: str = "fid") -> Statistics:
    """Statistics of a file of EDM (.npz) or EDM2 (.pkl, which has them for `fid` and for `fd_dinov2`).

    Raises a `UserError`, one line, for a file that is neither or whose numbers cannot be a mean and a covariance.
    """
    found = _from_pickle(path, metric) if path.suffix == ".pkl" else _from_npz(path)
    mean, cov = (torch.from_numpy(np.array(array, dtype=np.float64)) for array in found)
    if reason := fault(mean, cov):
        raise UserError(f"{path}: not statistics of features: {reason}")
    return Statistics(mean, (cov + cov.mT) / 2)


def fault(mean: Tensor, cov: Tensor) -> str:
    """Why these cannot be a mean and a covariance; empty if they can."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        return f"mu has shape {tuple(mean.shape)} and sigma {tuple(cov.shape)}, where (d,) and (d, d) are wanted"
    if not (mean.isfinite().all() and cov.isfinite().all()):
        return "mu or sigma has nan or inf"
    if (cov - cov.mT).abs().max() > SYMMETRY * cov.abs().max() or (cov.diagonal() < 0).any():
        return "sigma is not symmetric with a diagonal of at least 0"
    return ""


def _from_npz(path: Path) -> tuple[Any, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["mu"], file["sigma"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except KeyError:
        raise UserError(f"{path}: not EDM's statistics: arrays mu and sigma are wanted") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        raise UserError(f"{path}: not a whole .npz file of plain arrays mu and sigma") from None


def _from_pickle(path: Path, metric: str) -> tuple[Any, Any]:
    held = pickles.read(path)
    try:
        return _array(held[metric]["mu"]), _array(held[metric]["sigma"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{path}: not EDM2's statistics: mu and sigma of {metric} are wanted") from None


def _array(record: pickles.Record) -> np.ndarray:
    """A NumPy array of floats from its pickled state: version, shape, type, whether Fortran's order, bytes."""
    _, shape, kind, is_fortran, content = record.state
    name, order = kind.args[0], kind.state[1]
    if name not in ("f4", "f8") or order not in ("<", "=", ">") or not isinstance(content, bytes):
        raise ValueError("not floats")
    flat = np.frombuffer(content, np.dtype(order + name))
    if flat.size != math.prod(shape):
        raise ValueError("of another size")
    return flat.reshape(shape, order="F" if is_fortran else "C")
