"""Metrics beside the Fréchet distance, of the same features: KID, precision and recall, the Inception Score."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..errors import require
from .features import FeatureNetwork
from .metrics import PUBLISHED_INCEPTION, InceptionScore, KernelDistance, PrecisionRecall
from .vectors import Vectors

NAMES = ("kid", "precision_recall", "inception_score")
SUBSET = 1000  #: samples of a subset of the kernel distance, or half of all where they are few: else every subset is the same
NEIGHBOURS, SPLITS = 3, 10


def check(names: Any, network: FeatureNetwork, reference: str | None) -> None:
    """Raise a `UserError` unless `names` are some of NAMES that these features and this reference can give."""
    known = isinstance(names, list) and set(names) <= set(NAMES)
    require(known, "evaluation.metrics", names, f"must be a list of some of {', '.join(NAMES)}")
    scored = "inception_score" not in names or network.name == PUBLISHED_INCEPTION
    require(scored, "evaluation.metrics", names, "inception_score needs evaluation/features=inception and its published weights")
    has_features = reference in (None, "all") or not {"kid", "precision_recall"} & set(names)
    require(
        has_features, "evaluation.reference", reference, "statistics are no samples: kid and precision_recall want null or all"
    )


def about(names: list[str], num: int, whole: int | None = None) -> dict[str, Any]:
    """How these metrics are taken of `num` samples, for the protocol, against as many of the reference, if it has so many."""
    real = min(num, whole or num)
    how = {
        "kid": {"subset_size": max(2, min(SUBSET, real // 2)), "num_subsets": 100, "real": real},
        "precision_recall": {"neighbours": NEIGHBOURS, "real": real},
        "inception_score": {"num_splits": SPLITS},
    }
    return {name: how[name] for name in names}


def measure(
    names: list[str], made: Vectors, logits: Vectors, real: Vectors | Tensor | None, network: FeatureNetwork
) -> dict[str, float]:
    """The values of these metrics, of n samples' features `made` (n, d) and logits, against features `real` (m, d).

    They compare samples with samples, so that, unlike the distances, they hold all features in memory.
    """
    held = real if isinstance(real, Tensor | None) else real.all() if names else None
    metrics = {name: metric(name, len(made), held, network.name) for name in names}
    for name, found in metrics.items():
        found.update((logits if name == "inception_score" else made).all(), torch.arange(len(made)))
    return {key: float(value) for found in metrics.values() for key, value in found.compute().items()}


def metric(name: str, num: int, real: Tensor | None, network: str) -> Metric:
    """One of NAMES, for `num` samples."""
    if name == "inception_score":
        return InceptionScore(SPLITS)
    assert real is not None
    if name == "precision_recall":
        return PrecisionRecall(real, NEIGHBOURS)
    return KernelDistance(real, network, subset_size=about(["kid"], num, len(real))["kid"]["subset_size"])
