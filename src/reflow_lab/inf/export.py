"""A sampler as one file that needs torch alone: network, grid and solver's steps in one exported program."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..artifacts import write_atomically
from ..data.sets import to_uint8
from ..errors import require
from ..flow import MeanVelocity
from .grids import Grid
from .sampler import sampling_times
from .solvers import FixedStep, Solver

PROTOCOL = "protocol.json"  #: the file inside the program that says what it does


class Unrolled(nn.Module):
    """Noise x1, (n, ...), and labels (n,) of a conditional flow, to images: `inf.sampler.sample` with its steps written out.

    Images are floats in about [-1, 1], or with `as_uint8` bytes 0..255.
    """

    def __init__(self, velocity: MeanVelocity, solver: FixedStep, times: list[float], nfe: int, as_uint8: bool) -> None:
        super().__init__()
        self.velocity, self.solver, self.times, self.nfe, self.as_uint8 = velocity, solver, times, nfe, as_uint8

    def forward(self, x1: Tensor, label: Tensor | None = None) -> Tensor:
        """The images of this noise."""

        def field(x: Tensor, t: float) -> Tensor:
            return self.velocity(x, x.new_full((x.shape[0],), t), label=label).to(x.dtype)

        x = self.times[0] * x1
        for rule, t, t_next in zip(self.solver.rules(x, self.times, self.nfe), self.times, self.times[1:], strict=False):
            x = rule(field, x, t, t_next)
        return to_uint8(x) if self.as_uint8 else x


def program(
    velocity: nn.Module,
    shape: tuple[int, ...],
    *,
    solver: Solver,
    grid: Grid,
    nfe: int,
    t_max: float,
    num_classes: int = 0,
    as_uint8: bool = False,
) -> ExportedProgram:
    """The sampler as a program of torch.export, for any number of images: (x1,), or (x1, label) of a conditional flow.

    velocity: a network in evaluation mode; the program runs where and in the precision it is in. shape: of one sample. nfe,
    t_max as `inf.sampler.sample` takes them. UserError: a solver whose steps depend on the batch; others as there.
    """
    require(isinstance(solver, FixedStep), "solver", solver, "its steps depend on the batch, so that they cannot be written out")
    assert isinstance(solver, FixedStep)
    times = sampling_times(solver, grid, nfe, t_max).tolist()
    where = next(iter(velocity.parameters()))
    num = Dim("n", min=1)
    inputs = {"x1": torch.zeros(2, *shape, device=where.device)}
    if num_classes:
        inputs["label"] = torch.zeros(2, dtype=torch.int64, device=where.device)
    sampler = Unrolled(velocity, solver, times, nfe, as_uint8).eval()
    with torch.no_grad():
        return torch.export.export(sampler, tuple(inputs.values()), dynamic_shapes={name: {0: num} for name in inputs})


def save(made: ExportedProgram, path: Path, protocol: dict[str, Any]) -> None:
    """Write a program with a description of what it does, atomically.

    To use it: `torch.export.load(path).module()(x1)`; the description is the extra file `protocol.json`.
    """
    extra = {PROTOCOL: json.dumps(protocol, sort_keys=True)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # by its name torch would insist on the ending .pt2
            torch.export.save(made, file, extra_files=extra)

    write_atomically(path, write)
