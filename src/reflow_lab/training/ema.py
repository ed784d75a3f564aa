"""Exponential moving averages of the weights, several at once."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ..errors import require
from .module import FlowModule


def ema_name(halflife_mimg: float) -> str:
    """The profile's name in files and on the command line."""
    return f"ema{halflife_mimg:g}"


class EMA(L.Callback):
    """Averages of the velocity's weights, one a half-life in millions of images; the weights themselves are never touched.

    beta = 0.5^(batch / min(halflife, rampup_ratio * images seen)) (EDM): early on the average is short, whatever the half-life.
    """

    def __init__(self, halflives_mimg: Sequence[float], rampup_ratio: float = 0.05) -> None:
        for value in halflives_mimg:
            require(value > 0, "training.ema_halflives_mimg", value, "half-lives must be positive")
        self.halflives, self.rampup_ratio = {ema_name(h): h * 1e6 for h in halflives_mimg}, rampup_ratio
        self.averages: dict[str, list[Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start every average at the initial weights."""
        assert isinstance(pl_module, FlowModule)
        if not self.averages:
            self.averages = {name: [p.detach().clone() for p in pl_module.velocity.parameters()] for name in self.halflives}
        self.averages = {n: [p.to(pl_module.device) for p in average] for n, average in self.averages.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move every average towards the new weights."""
        assert isinstance(pl_module, FlowModule)
        images = trainer.global_step * pl_module.batch_size
        parameters = [p.detach() for p in pl_module.velocity.parameters()]
        for name, halflife in self.halflives.items():
            span = min(halflife, self.rampup_ratio * images)
            torch._foreach_lerp_(self.averages[name], parameters, 1 - 0.5 ** (pl_module.batch_size / span))

    def copy_to(self, name: str, network: nn.Module) -> None:
        """Load one average into a network of the same architecture."""
        with torch.no_grad():
            torch._foreach_copy_(list(network.parameters()), self.averages[name])

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.averages = state_dict["averages"]
