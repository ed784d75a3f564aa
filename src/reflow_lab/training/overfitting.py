"""Whether a base flow memorises its training images: its loss on some of them beside that on as many held-out ones."""

import math
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ..flow import interpolate
from ..lrn.couplings import HELD_OUT, Batch, Pairs
from .module import FlowModule

MOST = 256  #: pairs of each kind
FIRST = HELD_OUT + 2**40  #: where their noise begins: neither training nor its held-out pairs come here
CLEAR = 3  #: standard errors


def fixed_pairs(pairs: Pairs, num: int) -> Batch:
    """The first `num` images, unchanged, over and over to MOST or just below, with noise that is the same for any images."""
    return pairs.read(np.tile(np.arange(num), MOST // num), FIRST)


@torch.no_grad()
def velocity_losses(module: FlowModule, batch: Batch, num: int) -> Tensor:
    """E_t ||v(x_t, t) - (x1 - x0)||^2 per dimension of each of `num` images, float64 (num,), of `fixed_pairs`.

    The times are spread evenly over (0, 1), and each image has its repeats all along.
    """
    size, losses = len(batch.x0), []
    times = (torch.arange(size) + 0.5) / size
    for rows in torch.split(torch.arange(size), module.batch_size):  # the batches that a compiled network knows
        label = None if batch.label is None else batch.label[rows.to(batch.label.device)]
        here = rows.to(batch.x0.device)
        x0, x1, label, _ = Batch(batch.x0[here], batch.x1[here], label).to(module.device)
        t = times[rows].to(module.device)
        v = module.velocity(interpolate(x0, x1, t), t, label=label)
        losses.append((v - (x1 - x0)).square().flatten(1).mean(1).double().cpu())
    return torch.cat(losses).reshape(-1, num).mean(0)


def clearly_positive(differences: Tensor) -> bool:
    """Whether the mean of paired differences (n,) exceeds CLEAR standard errors."""
    return bool(differences.mean() > CLEAR * differences.std() / math.sqrt(len(differences)))


class Overfitting(L.Callback):
    """Log the velocity's loss on up to 256 training images and as many held-out ones, every `every_kimg` and at the end.

    Noise and times are fixed, augmentation and dropout off, the weights those of the moment. `overfitting/gap` is held-out
    over train, less 1. Warns once, when the held-out loss is clearly above its best and the training loss clearly below what
    it was then: by three standard errors over the images, each compared with itself.
    """

    def __init__(self, train: Pairs, heldout: Pairs, every_kimg: float) -> None:
        self.train, self.heldout, self.every_kimg = train, heldout, every_kimg
        self.num = min(MOST, len(train), len(heldout))
        self.best: dict[str, Any] = {}  #: kimg, and the images' train and heldout losses, at the lowest held-out mean so far
        self.warned = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        pl_module.velocity.eval()
        train, heldout = (
            velocity_losses(pl_module, fixed_pairs(pairs, self.num), self.num) for pairs in (self.train, self.heldout)
        )
        pl_module.velocity.train()
        ours, theirs = train.mean().item(), heldout.mean().item()
        found = {"overfitting/train": ours, "overfitting/heldout": theirs, "overfitting/gap": theirs / ours - 1}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        self._compare(train, heldout, pl_module.kimg)

    def _compare(self, train: Tensor, heldout: Tensor, kimg: float) -> None:
        if not self.best or heldout.mean() < self.best["heldout"].mean():
            self.best = {"kimg": kimg, "train": train, "heldout": heldout}
        rose = clearly_positive(heldout - self.best["heldout"])
        if rose and clearly_positive(self.best["train"] - train) and not self.warned:
            self._warn(heldout.mean().item(), kimg)

    def _warn(self, now: float, kimg: float) -> None:
        self.warned, best = True, self.best["kimg"]
        warnings.warn(
            f"at {kimg:g} kimg the network memorises its training images: its loss on held-out ones, {now:.3g}, was best"
            f" ({self.best['heldout'].mean():.3g}) at {best:g} kimg; more training.augment or dropout helps,"
            f" or stopping there with training.total_kimg={best:g}",
            stacklevel=1,
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"best": self.best, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.best, self.warned = state_dict["best"], state_dict["warned"]
