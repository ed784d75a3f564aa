"""Training a flow: the same module for a base flow and a ReFlow, which differ in coupling and start."""

import functools
import math
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..data.sets import moved
from ..dyn.objective import Losses, Objective
from ..flow_maps.distillation import Distillation
from ..lrn.couplings import Coupling
from ..noise import bits, uniform
from .label_dropout import drop_labels


class FlowModule(L.LightningModule):
    """velocity + objective (DYN) + coupling (LRN): one step draws pairs and times, keyed by the step, and returns the loss.

    `batch_size` is the global one; of several processes that train together, each computes its own rows of the batch, of which
    `first_row` is the first. What else acts on training (dropout, averages, diagnostics) is a callback.
    """

    velocity: nn.Module
    objective: Objective | Distillation
    coupling: Coupling
    losses: Losses  #: of the last step, for whoever logs or guards
    gradient_norm: Tensor  #: of the last step, before clipping

    def __init__(
        self,
        velocity: nn.Module,
        objective: Objective | Distillation,
        coupling: Coupling,
        *,
        batch_size: int,
        lr: float,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_kimg: float = 0,
        gradient_clip: float | None = None,
        label_dropout: float = 0,
        first_row: int = 0,
    ) -> None:
        super().__init__()
        self.velocity, self.objective, self.coupling = velocity, objective, coupling
        self.batch_size, self.seed, self.lr, self.betas = batch_size, seed, lr, betas
        self.warmup_steps = max(1, round(warmup_kimg * 1000 / batch_size))
        self.gradient_clip = float("inf") if gradient_clip is None else gradient_clip
        self.label_dropout, self.first_row = label_dropout, first_row

    @property
    def kimg(self) -> float:
        """Thousands of samples seen."""
        return self.global_step * self.batch_size / 1000

    def crossed(self, every_kimg: float) -> bool:
        """Whether the last step reached or crossed a multiple of `every_kimg`."""
        before, after = (step * self.batch_size / 1000 / every_kimg + 1e-9 for step in (self.global_step - 1, self.global_step))
        return math.floor(after) > math.floor(before)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean weighted loss of our rows in step `global_step`, by which batches are keyed; the loader's item is ignored."""
        step = self.global_step
        self._seed_dropout(step)
        x0, x1, label, augment = self.coupling.batch(step).to(self.device)
        first = step * self.batch_size + self.first_row
        positions = np.arange(first, first + len(x0))
        if self.label_dropout:
            assert label is not None, "an unconditional flow has no labels to drop"
            label = drop_labels(label, self.label_dropout, self.seed, positions)
        u = moved(uniform(self.seed, "training/times", positions, self.objective.num_uniform).squeeze(1), self.device)
        velocity = self.velocity if augment is None else functools.partial(self.velocity, augment=augment)
        self.losses = self.objective(velocity, x0, x1, u, label, step)
        return self.losses.total.mean()

    def _seed_dropout(self, step: int) -> None:
        """Make dropout's masks, too, a function of seed and step, and of the process: its rows have masks of their own.

        The CPU's generator heeds only 32 bits of its seed, so both are hashed into them. `torch.manual_seed` would seek out
        every kind of device: 0.5 ms.
        """
        stream = f"training/dropout/{self.first_row}" if self.first_row else "training/dropout"
        seed = int(bits(self.seed, stream, np.array([step]), 1)[0, 0] >> np.uint64(32))
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with linear warm-up; a learned loss weight is a second parameter group with its own rate."""
        groups: list[dict[str, Any]] = [{"params": list(self.velocity.parameters())}]
        if isinstance(self.objective, Objective) and (learned := list(self.objective.parameters())):
            groups.append({"params": learned, "lr": self.objective.weight.lr})
        optimizer = Adam(groups, lr=self.lr, betas=self.betas, fused=True)
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip the velocity's gradient to the norm `gradient_clip`, and keep its norm for the log."""
        self.gradient_norm = nn.utils.clip_grad_norm_(self.velocity.parameters(), self.gradient_clip)
