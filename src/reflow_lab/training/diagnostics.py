"""What a researcher watches while a flow trains: losses and gradients by time, on pairs kept out of training."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..dyn.weights import LearnedNormalisation
from ..flow import interpolate
from ..lrn.couplings import Coupling
from .module import FlowModule


def summary(name: str, values: Tensor) -> dict[str, float]:
    """Minimum, mean and maximum of per-sample values (n,)."""
    return {f"{name}_{how}": getattr(values, how)().item() for how in ("min", "mean", "max")}


def at_time(module: FlowModule, heldout: Coupling, t: float) -> dict[str, float]:
    """Statistics of the held-out pairs at one time t.

    `loss_mean` is the unweighted loss; `relative_loss`, a sample's loss over that mean, spreads over orders of magnitude in
    ReFlow, which is the motive of loss normalisation (Simple ReFlow, improvement 1). `gradient` is the norm of the weighted
    loss's gradient in the velocity, per sample. `calibration`, for a learned weight, is the mean of log l - u: 0 when it fits.
    """
    x0, x1, label = heldout.batch(0).to(module.device)
    times = torch.full((len(x0),), t, device=module.device)
    answers: list[Tensor] = []

    def recorded(
        x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            answers.append(module.velocity(x_t, t, s, label=label, lam_guid=lam_guid))
        return answers[-1].requires_grad_()

    with torch.enable_grad():
        losses = module.objective.at(recorded, x0, x1, times, label)
        (gradient,) = torch.autograd.grad(losses.total.sum(), answers[-1])
    mean, norms = losses.raw.mean(), gradient.flatten(1).norm(dim=1)
    found = {"loss_mean": mean.item()} | summary("relative_loss", losses.raw / mean) | summary("gradient", norms)
    if isinstance(weight := module.objective.weight, LearnedNormalisation):
        with torch.no_grad():
            expected = weight.log_loss(interpolate(x0, x1, times), times)
        found["calibration"] = (losses.raw.log() - expected).mean().item()
    return found


class ByTime(L.Callback):
    """Log `at_time` for the centre of each of `num_bins` bins of t, and the mean as `heldout_loss`, every `every_kimg`."""

    def __init__(self, heldout: Coupling, every_kimg: float, num_bins: int = 8) -> None:
        self.heldout, self.every_kimg, self.num_bins = heldout, every_kimg, num_bins

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        pl_module.velocity.eval()
        bins = {t: at_time(pl_module, self.heldout, t) for t in [(i + 0.5) / self.num_bins for i in range(self.num_bins)]}
        pl_module.velocity.train()
        logged = {f"by_time/t{t:.3f}/{name}": value for t, found in bins.items() for name, value in found.items()}
        logged["heldout_loss"] = sum(found["loss_mean"] for found in bins.values()) / self.num_bins
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)
