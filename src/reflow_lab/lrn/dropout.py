"""Improvement 4: a smaller dropout rate than the teacher's."""

import lightning as L
from torch import nn

from ..errors import require


def scale_dropout(network: nn.Module, fraction: float) -> None:
    """Multiply every dropout rate of a network by `fraction`."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p *= fraction


class Dropout(L.Callback):
    """Train with `fraction`, in [0, 1], of the network's dropout rate, which an experiment sets to its teacher's.

    Simple ReFlow (arXiv 2410.07815), improvement 4: 1 is the baseline, 0 turns dropout off.
    """

    def __init__(self, fraction: float = 1.0) -> None:
        require(0 <= fraction <= 1, "lrn.dropout.fraction", fraction, "must lie in [0, 1]")
        self.fraction = fraction

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Scale the rates once, before training starts."""
        velocity = pl_module.velocity
        assert isinstance(velocity, nn.Module)
        scale_dropout(velocity, self.fraction)
