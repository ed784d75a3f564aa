"""Labels left out in training, so that a network also learns the velocity of all classes together (arXiv 2207.12598)."""

import torch
from torch import Tensor

from ..data.sets import moved
from ..flow import NO_LABEL
from ..noise import Indices, uniform

STREAM = "training/label_dropout"


def drop_labels(label: Tensor, probability: float, seed: int, positions: Indices) -> Tensor:
    """The labels (n,), each NO_LABEL with this probability in [0, 1]; keyed by the seed and a sample's position in training."""
    dropped = moved(uniform(seed, STREAM, positions)[:, 0] < probability, label.device)
    return torch.where(dropped, NO_LABEL, label)
