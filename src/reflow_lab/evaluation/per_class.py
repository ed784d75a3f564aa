"""Fréchet distances class by class, where a class has few images."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import Indices


def distance_of_few(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of features (n, d) and (m, d), as `frechet.Reference` has it, by the n x m product of the two.

    tr (A^1/2 B A^1/2)^1/2 is the nuclear norm of A^1/2 B^1/2, thus of X Y^T / sqrt((n-1)(m-1)) with centred features X and Y:
    with fewer samples than dimensions exact and cheap, where the covariances are singular and large.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples a set, not {min(len(a), len(b))}")
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a.double(), b.double()))
    shift = a.double().mean(0) - b.double().mean(0)
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.mT).sum()
    return max(float(shift.square().sum() + spread), 0.0)


class ClassDistance(NamedTuple):
    """A class's distance of `num` generated images to `num` real ones; `floor`: that of `num` other real ones, None without.

    With num below the features' dimension it is biased upwards, the floor alike. distance is None, and `num` what there is, where
    a class has too few real images.
    """

    label: int
    num: int
    distance: float | None
    floor: float | None


def members(labels: Tensor, label: int, most: int) -> Indices:
    """The indices of the first `most` images of a class."""
    found: Indices = np.flatnonzero((labels == label).cpu().numpy())
    return found[:most]


def usable(reference: int, floor: int, most: int, least: int) -> tuple[int, bool]:
    """How many images of a class are compared, and whether they have a floor, from the numbers of real ones there are.

    Both sets are cut to one number, as distances of different numbers do not compare; a floor below `least` images is done
    without rather than that it decides.
    """
    has_floor = floor >= least
    return min(most, reference, floor if has_floor else most), has_floor


def summary(found: list[ClassDistance]) -> dict[str, float]:
    """Means over the classes that have a distance, and the worst class with its distance; empty where none has."""
    known = [(c.distance, c.floor, c.label) for c in found if c.distance is not None]
    if not known:
        return {}
    worst, _, label = max(known, key=lambda c: c[0])
    floors = [floor for _, floor, _ in known if floor is not None]
    means = {"mean": float(np.mean([d for d, _, _ in known])), "worst": worst, "worst_class": float(label)}
    return means | ({"mean_floor": float(np.mean(floors))} if floors else {})
