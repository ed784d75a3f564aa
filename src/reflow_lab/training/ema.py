"""Moving averages of the weights, several at once, and snapshots of them for post-hoc averages."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ..artifacts import remove_leftovers
from ..errors import require
from ..networks import files
from .module import FlowModule
from .power_ema import sigma_rel_to_gamma, step_beta


def ema_name(halflife_mimg: float) -> str:
    """The profile's name in files and on the command line."""
    return f"ema{halflife_mimg:g}"


def sigma_name(sigma_rel: float) -> str:
    """The name of a power-function average of that relative width."""
    return f"sigma{sigma_rel:g}"


def halflife_beta(before: float, after: float, halflife: float, rampup_ratio: float) -> float:
    """0.5^(batch / min(halflife, rampup_ratio * images seen)) (EDM): early on the average is short, whatever the half-life."""
    return float(0.5 ** ((after - before) / min(halflife, rampup_ratio * after)))


class EMA(L.Callback):
    """Averages of the velocity's weights; the weights themselves are never touched.

    One for each half-life in millions of images (`halflife_beta`), and a power-function one for each relative width in
    `sigma_rels` (EDM2, `power_ema.step_beta`), which forgets the weights that training starts from in the first step.
    """

    def __init__(self, halflives_mimg: Sequence[float], sigma_rels: Sequence[float] = (), rampup_ratio: float = 0.05) -> None:
        for value in halflives_mimg:
            require(value > 0, "training.ema_halflives_mimg", value, "half-lives must be positive")
        self.betas: dict[str, Callable[[float, float], float]] = {}  #: by name: what a step from images to images keeps
        for value in halflives_mimg:
            self.betas[ema_name(value)] = partial(halflife_beta, halflife=value * 1e6, rampup_ratio=rampup_ratio)
        for value in sigma_rels:
            self.betas[sigma_name(value)] = partial(step_beta, gamma=sigma_rel_to_gamma(value))
        self.averages: dict[str, list[Tensor]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start every average at the initial weights."""
        assert isinstance(pl_module, FlowModule)
        if not self.averages:
            self.averages = {name: [p.detach().clone() for p in pl_module.velocity.parameters()] for name in self.betas}
        self.averages = {n: [p.to(pl_module.device) for p in average] for n, average in self.averages.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move every average towards the new weights."""
        assert isinstance(pl_module, FlowModule)
        images = trainer.global_step * pl_module.batch_size
        parameters = [p.detach() for p in pl_module.velocity.parameters()]
        for name, beta in self.betas.items():
            torch._foreach_lerp_(self.averages[name], parameters, 1 - beta(images - pl_module.batch_size, images))

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


def snapshot_name(images: int, sigma_rel: float) -> str:
    """The file name of a snapshot: thousands of images with three decimals, so that every step has its own, and the width."""
    return f"{images / 1000:011.3f}kimg-{sigma_rel:.3f}.safetensors"


class Snapshots(L.Callback):
    """Write every power-function average of `ema` into `folder`, every `every_kimg` and after the last step.

    From them `reflow-lab ema` makes an average of any width. A file's description says at `ema` which average it is. A run
    that goes on from a checkpoint writes what came after it again, to the same names.

    Weights are stored in float32. Measured on a toy of 64 times, widths 0.05 and 0.1, against averages followed directly: width
    0.075 is off by 3e-7 of the weights' norm (float16: 2e-4), width 0.02 by 3e-5 (float16: 4e-3, a tenth of its distance to the
    stored width 0.05, because the reconstruction amplifies rounding 17 times there).
    """

    def __init__(
        self,
        ema: EMA,
        network: nn.Module,
        folder: Path,
        description: dict[str, Any],
        *,
        sigma_rels: Sequence[float],
        every_kimg: float,
    ) -> None:
        self.ema, self.network, self.folder, self.description = ema, network, folder, description
        self.sigma_rels, self.every_kimg = sigma_rels, every_kimg

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder, and remove what a killed process left half written."""
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder, ".*.tmp")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Write when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        images = trainer.global_step * pl_module.batch_size
        for sigma_rel in self.sigma_rels:
            self._write(images, sigma_rel)

    def _write(self, images: int, sigma_rel: float) -> None:
        name = sigma_name(sigma_rel)
        names = [key for key, _ in self.network.named_parameters()]
        state = self.network.state_dict() | dict(zip(names, self.ema.averages[name], strict=True))
        about = {"profile": name, "kimg": images / 1000, "ema": {"images": images, "sigma_rel": sigma_rel}}
        files.save_state(state, self.folder / snapshot_name(images, sigma_rel), self.description | about)
