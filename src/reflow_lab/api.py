"""The lab from Python: a trained flow in two calls, without a configuration.

>>> import reflow_lab
>>> velocity = reflow_lab.load(run)  # a run folder, a weight file, or "package:fashion_mnist.safetensors"
>>> images = reflow_lab.sample(velocity, 4, nfe=2)
>>> images.shape
torch.Size([4, 1, 32, 32])
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data.autoencoder import Codec
from .errors import require
from .inf.grids import Grid, Sigmoid, Uniform
from .inf.guidance import Guidance, check
from .inf.sampler import advise, require_suited
from .inf.sampler import sample as integrate
from .inf.solvers import DPM, FlowMap, Solver
from .lrn.store import pair_labels, pair_noise
from .networks import files
from .noise import chunks


class Flow(nn.Module):
    """A trained velocity, a `MeanVelocity`, with what a sampler must know of it."""

    def __init__(self, velocity: nn.Module, description: dict[str, Any]) -> None:
        super().__init__()
        self.velocity, self.description = velocity, description
        self.shape: tuple[int, ...] = tuple(description["shape"])
        self.num_classes, self.t_max = int(description["num_classes"]), float(description["t_max"])

    def forward(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """F(x_t, t, s); see `MeanVelocity`."""
        return self.velocity(x_t, t, s, label=label, lam_guid=lam_guid)

    def decode(self, samples: Tensor, autoencoder: str | None = None) -> Tensor:
        """Samples of a flow of latents as images, float32 (n, 3, h, w) in [-1, 1]; those of any other flow as they are.

        Where the samples lie. `autoencoder`: its folder, if the run's own is another machine's; other weights are a `UserError`.
        """
        about = self.description.get("latents")
        return samples if about is None else Codec.described(about, autoencoder).decode(samples)


def load(run_or_file: str | Path, profile: str | None = None) -> Flow:
    """The velocity of a run folder (outputs/train/...), a weight file, or `package:fashion_mnist.safetensors`.

    `profile`: raw, or an average such as ema0.01; by default the average with the longest half-life. In evaluation mode, float32,
    on the CPU. Raises `UserError` for a missing, unfinished or damaged file.
    """
    path = files.find(run_or_file, profile)
    return Flow(files.load(path), files.describe(path)).eval()


def sample(
    velocity: Flow,
    num_images: int,
    nfe: int = 9,
    seed: int = 0,
    *,
    solver: Solver | None = None,
    grid: Grid | None = None,
    t_max: float | None = None,
    label: Tensor | None = None,
    guidance: Guidance | None = None,
    batch_size: int = 250,
) -> Tensor:
    """Samples, float32 (num_images, *velocity.shape) on the CPU; images are about [-1, 1], not clipped; see `Flow.decode`.

    `nfe` calls of the velocity a sample, by default with the improved INF: DPM-Solver(r = 0.4) on the sigmoid grid, or the jumps
    of a flow map on the uniform one, from the flow's own t_max. Noise is keyed by (seed, index): the first images of a larger
    call are the same, to rounding. `label` int64 (num_images,) for a conditional flow, by default uniform over the classes.
    `guidance`: `ClassifierFree(weight=0.4)` or `Auto(path=..., weight=0.7)` of `inf.guidance`. Runs where the weights are.
    Raises `UserError` if a number is below 1, t_max outside (0, 1], or labels or guidance do not fit.
    """
    for key, value in {"num_images": num_images, "batch_size": batch_size}.items():
        require(isinstance(value, int) and value >= 1, key, value, "must be a whole number of at least 1")
    own_solver, own_grid = suited(velocity.description)
    solver, grid = solver or own_solver, grid or own_grid
    require(hasattr(solver, "num_steps"), "solver", solver, "must be one of reflow_lab.inf.solvers, e.g. Heun()")
    require_suited(solver, velocity.description, guidance)
    advise(solver, velocity.description)
    device, start = next(velocity.parameters()).device, velocity.t_max if t_max is None else t_max
    uniform = pair_labels(seed, np.arange(num_images), velocity.num_classes)
    given = uniform if label is None else fitting(label, velocity.num_classes, num_images)
    guided = check(guidance, velocity.description).velocity(velocity, "32-true", device)
    made = []
    for chunk in chunks(np.arange(num_images), batch_size):
        x1 = pair_noise(seed, chunk, velocity.shape).to(device)
        y = None if given is None else given[torch.from_numpy(chunk)].to(device)
        made.append(integrate(guided, x1, solver=solver, grid=grid, nfe=nfe, t_max=start, label=y).cpu())
    return torch.cat(made)


def suited(description: Mapping[str, Any]) -> tuple[Solver, Grid]:
    """The solver and grid for a flow of this description where none are given."""
    if not files.jumps(description):
        return DPM(), Sigmoid()
    return FlowMap(gamma=1.0 if description.get("only_to_data") else 0.0), Uniform()


def fitting(label: Tensor, num_classes: int, num_images: int) -> Tensor:
    """The labels, on the CPU; raises a `UserError` unless there is one for each image and the flow knows them all."""
    require(num_classes > 0, "label", "given", "must be omitted: this flow is unconditional")
    require(label.shape == (num_images,), "label", tuple(label.shape), f"must have the shape ({num_images},)")
    known = bool(((label >= 0) & (label < num_classes)).all())
    require(known, "label", f"{label.min()}..{label.max()}", f"must lie in 0..{num_classes - 1}")
    return label.cpu().long()
