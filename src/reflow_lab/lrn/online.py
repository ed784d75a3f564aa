"""Online pairs: a frozen teacher draws every batch's backward pairs as training goes, for who has more compute than disk."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from .. import parts
from ..data.sets import moved
from ..flow import MeanVelocity
from ..inf.sampler import sample
from ..noise import Indices, normal, uniform
from .couplings import HELD_OUT, Batch
from .pairs import drawing, require_solver

STREAM = "coupling/online"  #: of the noise: no store and no evaluation draws from it


@dataclass(frozen=True)
class OnlinePairs:
    """Backward pairs that nobody keeps: noise keyed by its position in training, and where the teacher's ODE carries it.

    `sampling` holds solver (fixed-step, so that a pair does not depend on its batch), grid, nfe and t_max, as `inf.sample` takes
    them. The velocity is called without gradients, in the mode it is in.
    """

    velocity: MeanVelocity
    sampling: dict[str, Any]
    shape: tuple[int, ...]
    num_classes: int
    seed: int
    device: torch.device

    def __len__(self) -> int:
        """As many as there are positions before those of the held-out pairs."""
        return HELD_OUT

    def read(self, indices: Indices, position: int) -> Batch:
        """As many pairs as there are indices, from `position` on; which indices is the same to them."""
        positions = np.arange(position, position + len(indices))
        x1, label = moved(normal(self.seed, STREAM, positions, self.shape), self.device), None
        if self.num_classes:
            coins = uniform(self.seed, f"{STREAM}/labels", positions)[:, 0]
            label = moved((coins * self.num_classes).long(), self.device)
        return Batch(sample(self.velocity, x1, label=label, **self.sampling), x1, label)


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """How the teacher draws online pairs, as a store's recipe says it; raises a `UserError` for an adaptive solver."""
    require_solver(cfg)
    parts.require_whole("pairs.nfe", cfg.pairs.nfe, 1)
    return drawing(cfg, parts.teacher(cfg))


def open_online(cfg: DictConfig) -> OnlinePairs:
    """The configured teacher, frozen, in its precision and on its device."""
    teacher, described = parts.teacher(cfg), recipe(cfg)
    sampling = {key: instantiate(cfg.pairs[key]) for key in ("solver", "grid")}
    sampling |= {key: described[key] for key in ("nfe", "t_max")}
    shape = parts.sample_shape(parts.data_source(cfg))
    velocity = parts.velocity(cfg, teacher, "pairs.guidance").requires_grad_(False)
    return OnlinePairs(velocity, sampling, shape, teacher.num_classes, cfg.seed, parts.device(cfg))
