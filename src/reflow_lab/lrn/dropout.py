"""Improvement 4: a smaller dropout rate than the teacher's."""

import lightning as L
from torch import nn

from ..errors import require


def dropout_rate(network: nn.Module) -> float:
    """The largest rate among a network's dropout layers."""
    return max((m.p for m in network.modules() if isinstance(m, nn.Dropout)), default=0.0)


def scale_dropout(network: nn.Module, fraction: float) -> None:
    """Multiply every dropout rate of a network by `fraction`."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p *= fraction


class Dropout(L.Callback):
    """Train with `fraction` of the teacher's dropout (Simple ReFlow, LRN): 1 is the baseline, 0 turns it off."""

    def __init__(self, fraction: float = 1.0) -> None:
        require(fraction >= 0, "fraction", fraction, "must be at least 0")
        self.fraction = fraction

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Scale the rates once, before training starts."""
        scale_dropout(pl_module.velocity, self.fraction)
