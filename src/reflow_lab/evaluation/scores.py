"""Metrics beside the Fréchet distance, of the same features: KID, precision and recall, the Inception Score."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..errors import require
from .features import FeatureNetwork
from .inception import InceptionFeatures
from .metrics import InceptionScore, KernelDistance, PrecisionRecall

NAMES = ("kid", "precision_recall", "inception_score")
SUBSET = 1000  #: samples of a subset of the kernel distance, or all where there are fewer


def check(names: Any, network: FeatureNetwork, reference: str | None) -> None:
    """Raise a `UserError` unless `names` are some of NAMES that these features and this reference can give."""
    known = isinstance(names, list) and set(names) <= set(NAMES)
    require(known, "evaluation.metrics", names, f"must be a list of some of {', '.join(NAMES)}")
    has_logits = isinstance(network, InceptionFeatures)
    require(
        has_logits or "inception_score" not in names,
        "evaluation.metrics",
        names,
        "inception_score needs evaluation/features=inception",
    )
    has_features = reference in (None, "all") or not {"kid", "precision_recall"} & set(names)
    require(
        has_features, "evaluation.reference", reference, "statistics are no samples: kid and precision_recall want null or all"
    )


def measure(names: list[str], network: FeatureNetwork, x0: Tensor, made: Tensor, real: Tensor | None) -> dict[str, float]:
    """The values of these metrics, of samples x0 (n, ...) with features `made` (n, d), against features `real` (m, d)."""
    indices = torch.arange(len(made))
    found: dict[str, float] = {}
    for name in names:
        metric: Metric
        if name == "inception_score":
            assert isinstance(network, InceptionFeatures)
            metric = InceptionScore()
            metric.update(network.outputs(x0).logits, indices)
        else:
            assert real is not None
            kernel = name == "kid"
            size = min(SUBSET, len(made), len(real))
            metric = KernelDistance(real, network.name, subset_size=size) if kernel else PrecisionRecall(real)
            metric.update(made, indices)
        found |= {key: float(value) for key, value in metric.compute().items()}
    return found
