"""Metrics beside the Fréchet distance, of the same features: KID, precision and recall, the Inception Score."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..errors import require
from .features import FeatureNetwork
from .inception import InceptionFeatures
from .metrics import PUBLISHED_INCEPTION, InceptionScore, KernelDistance, PrecisionRecall

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


def about(names: list[str], num: int) -> dict[str, Any]:
    """How these metrics are taken of `num` samples, for the protocol."""
    how = {
        "kid": {"subset_size": max(2, min(SUBSET, num // 2)), "num_subsets": 100, "real": num},
        "precision_recall": {"neighbours": NEIGHBOURS, "real": num},
        "inception_score": {"num_splits": SPLITS},
    }
    return {name: how[name] for name in names}


def measure(names: list[str], network: FeatureNetwork, x0: Tensor, made: Tensor, real: Tensor | None) -> dict[str, float]:
    """The values of these metrics, of samples x0 (n, ...) with features `made` (n, d), against features `real` (m, d)."""
    indices = torch.arange(len(made))
    found: dict[str, float] = {}
    for name in names:
        metric: Metric
        if name == "inception_score":
            assert isinstance(network, InceptionFeatures)
            metric = InceptionScore(SPLITS)
            metric.update(network.outputs(x0).logits, indices)
        else:
            assert real is not None
            kernel = name == "kid"
            size = about(["kid"], min(len(made), len(real)))["kid"]["subset_size"]
            metric = KernelDistance(real, network.name, subset_size=size) if kernel else PrecisionRecall(real, NEIGHBOURS)
            metric.update(made, indices)
        found |= {key: float(value) for key, value in metric.compute().items()}
    return found
