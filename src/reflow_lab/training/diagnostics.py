"""What a researcher watches while a flow trains: losses and gradients by time, on pairs kept out of training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ..dyn.objective import Objective
from ..dyn.weights import LOSS_FLOOR, LearnedNormalisation
from ..flow import interpolate
from ..lrn.couplings import Batch, Coupling
from .module import FlowModule


def summary(name: str, values: Tensor) -> dict[str, float]:
    """Minimum, mean and maximum of per-sample values (n,)."""
    return {f"{name}_{how}": getattr(values, how)().item() for how in ("min", "mean", "max")}


class AtTime(NamedTuple):
    """Held-out pairs at one time: unweighted losses (n,), gradient norms (n,), and what else is known by name."""

    raw: Tensor
    gradient: Tensor
    more: dict[str, float]


def at_time(module: FlowModule, batch: Batch, t: float) -> AtTime:
    """The pairs at one time t; the gradient is that of the weighted loss in the velocity, per sample."""
    assert isinstance(module.objective, Objective)
    x0, x1, label, _ = batch
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
    raw, norms = losses.raw.detach(), gradient.flatten(1).norm(dim=1)
    if not isinstance(weight := module.objective.weight, LearnedNormalisation):
        return AtTime(raw, norms, {})
    with torch.no_grad():
        expected = weight.log_loss(interpolate(x0, x1, times), times)
    return AtTime(raw, norms, {"calibration": (raw.clamp(min=LOSS_FLOOR).log() - expected).mean().item()})


def by_kind(raw: Tensor, counts: Mapping[str, int]) -> dict[str, float]:
    """`heldout_loss/KIND` for each of several kinds of pairs: raw, (times, n), holds counts[kind] samples of each, in order."""
    if len(counts) < 2:
        return {}
    losses = torch.split(raw, list(counts.values()), dim=1)
    return {f"heldout_loss/{kind}": loss.mean().item() for kind, loss in zip(counts, losses, strict=True)}


def by_time(module: FlowModule, heldout: Coupling, times: Sequence[float], counts: Mapping[str, int]) -> dict[str, float]:
    """What `ByTime` logs: statistics of the held-out pairs at each of the times, and `heldout_loss`, the mean over all of them.

    `loss_mean` is the unweighted loss. `relative_loss`, a sample's loss over `heldout_loss`, shows how losses spread over time
    and samples: in ReFlow over orders of magnitude, the motive of loss normalisation (Simple ReFlow, arXiv 2410.07815,
    improvement 1). `calibration`, for a learned weight, is the mean of log l - u: 0 when it fits.
    """
    batch = heldout.batch(0).to(module.device)
    found = {t: at_time(module, batch, t) for t in times}
    losses = torch.stack([raw for raw, _, _ in found.values()])
    mean = losses.mean().item()
    logged = {"heldout_loss": mean} | by_kind(losses, counts)
    for t, (raw, gradient, more) in found.items():
        spread = summary("relative_loss", raw / max(mean, LOSS_FLOOR)) | summary("gradient", gradient)
        values = {"loss_mean": raw.mean().item()} | spread | more
        logged |= {f"by_time/t{t:.3f}/{name}": value for name, value in values.items()}
    return logged


class Mix(L.Callback):
    """Log once, after the first step, which share of a batch each kind of pair has: `mix/KIND`, adding up to 1."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.shares = {f"mix/{kind}": count / sum(counts.values()) for kind, count in counts.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Log if this was the first step: what a run that begins anew had logged by then is cut."""
        for logger in trainer.loggers if trainer.global_step == 1 else ():
            logger.log_metrics(self.shares, 1)


class ByTime(L.Callback):
    """Log `by_time` at the centre of each of `num_bins` bins of t, every `every_kimg`; `counts` is the mix of `heldout`."""

    def __init__(self, heldout: Coupling, every_kimg: float, counts: Mapping[str, int], num_bins: int = 8) -> None:
        self.heldout, self.every_kimg, self.counts = heldout, every_kimg, counts
        self.times = [(i + 0.5) / num_bins for i in range(num_bins)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        pl_module.velocity.eval()
        logged = by_time(pl_module, self.heldout, self.times, self.counts)
        pl_module.velocity.train()
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)
