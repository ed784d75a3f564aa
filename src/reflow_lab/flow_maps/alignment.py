"""The first phase of distillation: the time embedding of a flow map, which takes t itself, learns its teacher's of ln(sigma)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..noise import uniform

BATCH = 512  #: times a step, half of them uniform, half with uniform ln(sigma) in ln 0.002 to ln 80


def align(network: nn.Module, teacher: nn.Module, num_steps: int, seed: int, lr: float = 1e-3) -> list[float]:
    """Fit `network.jump.time` so that the first layer after the features of time gets from it what it gets in the teacher.

    Both are raw networks of EDM's kind with equal weights elsewhere; nothing else of the network changes. Returns the relative
    mean square error before and after each tenth of the steps; with one that has no other time to learn, an empty list.
    """
    time = getattr(getattr(network, "jump", None), "time", None)
    if time is None:
        return []
    first = first_layer(teacher)
    target: Callable[[Tensor], Tensor] = lambda t: first(teacher.time_features(t))  # type: ignore[operator]  # noqa: E731
    optimizer = torch.optim.Adam(time.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    errors = [relative_error(first, time, target, seed, num_steps)]
    for step in range(num_steps):
        with torch.enable_grad():
            t = times(seed, step)
            loss = (first(time(t)) - target(t).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) * 10 % num_steps < 10:
            errors.append(relative_error(first, time, target, seed, num_steps))
    network.zero_grad()
    return errors


def first_layer(network: nn.Module) -> Any:
    """The layer of a network of EDM's kind that takes the features of time."""
    return network.map_layer0 if hasattr(network, "map_layer0") else network.emb_noise


def times(seed: int, step: int) -> Tensor:
    """The times of a step, float32 (BATCH,)."""
    u = uniform(seed, "flow_maps/alignment", np.arange(step * BATCH, (step + 1) * BATCH))[:, 0]
    low, high = np.log(0.002), np.log(80.0)
    return torch.where(torch.arange(BATCH) % 2 == 0, u, torch.sigmoid(low + (high - low) * u)).float()


@torch.no_grad()
def relative_error(first: Any, time: nn.Module, target: Callable[[Tensor], Tensor], seed: int, step: int) -> float:
    """The mean square of what is missing over that of what is wanted, at times that no step sees."""
    t = times(seed, step)
    wanted = target(t)
    return ((first(time(t)) - wanted).square().mean() / wanted.square().mean()).item()
