"""The sampling stage (INF) while a flow trains: few-step samples of held-out noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ..artifacts import write_atomically
from ..data.sets import to_uint8
from ..evaluation.paired import paired_rmse
from ..evaluation.straightness import sample_straightness
from ..inf.grids import Grid
from ..inf.sample import picture
from ..inf.solvers import Solver
from ..lrn.couplings import Coupling
from .module import FlowModule


class FewStep(L.Callback):
    """Sample the held-out pairs' noise with inf's solver and grid, from the weights of the moment, every `every_kimg`.

    Logs how straight the trajectories were and, where noise and image are `paired`, the error to the pair's image. Images go to
    `picture_path`, a fixed grid from the same noise each time, and to a logger that takes them, as Weights & Biases. `decode`
    makes images of samples that are latents.
    """

    def __init__(
        self,
        heldout: Coupling,
        solver: Solver,
        grid: Grid,
        nfe: int,
        t_max: float,
        every_kimg: float,
        paired: bool,
        picture_path: Path,
        decode: Callable[[torch.Tensor], torch.Tensor] = lambda made: made,
    ) -> None:
        self.heldout, self.every_kimg, self.paired, self.picture_path = heldout, every_kimg, paired, picture_path
        self.decode = decode
        self.sampling: dict[str, Any] = {"solver": solver, "grid": grid, "nfe": nfe, "t_max": t_max}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Sample when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        x0, x1, label, _augment = self.heldout.batch(0).to(pl_module.device)
        pl_module.velocity.eval()
        made, straightness = sample_straightness(pl_module.velocity, x1, label=label, **self.sampling)
        pl_module.velocity.train()
        prefix = f"few_step/nfe{self.sampling['nfe']}"
        found = {f"{prefix}/straightness": straightness.mean().item()}
        if self.paired:
            found[f"{prefix}/paired_rmse"] = paired_rmse(made, x0).mean().item()
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        if made.ndim == 4:
            self._show(trainer, to_uint8(self.decode(made).cpu()), prefix)

    def _show(self, trainer: L.Trainer, images: torch.Tensor, prefix: str) -> None:
        grid = picture(images)
        write_atomically(self.picture_path, lambda p: grid.save(p, "png"))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"{prefix}/samples", [grid], step=trainer.global_step)
