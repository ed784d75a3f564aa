"""The first phase of distillation: the time embedding of a flow map, which takes t itself, learns to stand for its teacher's."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.embedding import TimeEmbedder
from ..noise import uniform

BATCH = 512  #: times a step, half of them uniform, half with uniform ln(sigma) in ln 0.002 to ln 80


def align(network: nn.Module, teacher: nn.Module, num_steps: int, seed: int, lr: float = 1e-3) -> list[float]:
    """Fit the flow map's `jump.time` so that the first layer after the features of time gets from it what it gets in the teacher.

    Both are raw networks with equal weights elsewhere; nothing else of the network changes. Returns the relative mean square
    error before and after each tenth of the steps.
    """
    told, jump = embedder(teacher), embedder(network).jump
    assert jump is not None, "a velocity has no time embedding to align"
    time = jump.time
    wanted: Callable[[Tensor], Tensor] = lambda t: told.first(told.time_features(t)).detach()  # noqa: E731
    given: Callable[[Tensor], Tensor] = lambda t: told.first(time(t))  # noqa: E731
    optimizer = torch.optim.Adam(time.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    errors = [relative_error(given, wanted, times(seed, num_steps))]
    for step in range(num_steps):
        t = times(seed, step)
        loss = (given(t) - wanted(t)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) * 10 % num_steps < 10:
            errors.append(relative_error(given, wanted, times(seed, num_steps)))
    return errors


def embedder(network: nn.Module) -> TimeEmbedder:
    """The part of a network that knows time: itself, or its `conditioning`."""
    found: Any = getattr(network, "conditioning", network)
    return cast(TimeEmbedder, found)


def times(seed: int, step: int) -> Tensor:
    """The times of a step, float32 (BATCH,)."""
    u = uniform(seed, "flow_maps/alignment", np.arange(step * BATCH, (step + 1) * BATCH))[:, 0]
    low, high = np.log(0.002), np.log(80.0)
    return torch.where(torch.arange(BATCH) % 2 == 0, u, torch.sigmoid(low + (high - low) * u)).float()


@torch.no_grad()
def relative_error(given: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor], t: Tensor) -> float:
    """The mean square of what is missing over that of what is wanted."""
    target = wanted(t)
    return ((given(t) - target).square().mean() / target.square().mean()).item()
