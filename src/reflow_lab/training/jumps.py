"""What a researcher watches while a flow map trains: how wrong its jumps are by their length, on pairs kept out of training."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from ..flow import MeanVelocity, append_dims, flow_map, interpolate
from ..flow_maps.distillation import Distillation
from ..lrn.couplings import Batch, Coupling
from .module import FlowModule


class ByJump(L.Callback):
    """Log `by_jump` for jumps of each of `lengths` every `every_kimg`."""

    def __init__(self, heldout: Coupling, every_kimg: float, lengths: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 0.95)) -> None:
        self.heldout, self.every_kimg, self.lengths = heldout, every_kimg, lengths

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Measure when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        pl_module.velocity.eval()
        logged = by_jump(pl_module, self.heldout.batch(0).to(pl_module.device), self.lengths)
        pl_module.velocity.train()
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)


def by_jump(module: FlowModule, batch: Batch, lengths: Sequence[float]) -> dict[str, float]:
    """`error`, the mean square of the objective's g, and `semigroup`, each by length; `heldout_error` is the mean of the errors.

    The jumps are centred on t = 1/2; those of a consistency model, which has no semigroup, end at 0. The warm-up is as it stands:
    its rise is one of the errors, too. The flow map is told the weakest guidance that it is trained for.
    """
    assert isinstance(module.objective, Distillation)
    found: dict[str, float] = {}
    low, only_to_data = module.objective.lam_guid[0], module.objective.matching.objective.only_to_data
    for length in lengths:
        stop = 0.0 if only_to_data else (1 - length) / 2
        t, s, lam_guid = (batch.x0.new_full((len(batch.x0),), z) for z in (stop + length, stop, low))
        with torch.no_grad():
            error = module.objective.at(module.velocity, batch, t, s, lam_guid, module.global_step).error
            found[f"by_jump/{length:g}/error"] = error.mean().item()
            if not only_to_data:
                missed = semigroup(module.velocity, interpolate(batch.x0, batch.x1, t), t, s, batch.label, lam_guid)
                found[f"by_jump/{length:g}/semigroup"] = missed.mean().item()
    errors = [value for name, value in found.items() if name.endswith("error")]
    return {"heldout_error": sum(errors) / len(errors)} | found


def semigroup(velocity: MeanVelocity, x_t: Tensor, t: Tensor, s: Tensor, label: Tensor | None, lam_guid: Tensor) -> Tensor:
    """The mean square of f(f(x_t, t, u), u, s) - f(x_t, t, s) over |t - s|^2, u half-way, (n,): 0 for every ODE's flow map."""

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return flow_map(velocity(x, t, s, label=label, lam_guid=lam_guid), x, t, s)

    u = (t + s) / 2
    missed = (jump(jump(x_t, t, u), u, s) - jump(x_t, t, s)) / append_dims(t - s, x_t)
    return missed.square().flatten(1).mean(1)
