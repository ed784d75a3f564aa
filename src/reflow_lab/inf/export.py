"""A sampler as one file that needs torch alone: network, grid and solver's steps in one exported program."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import reflow_lab

from ..artifacts import write_atomically
from ..data.sets import to_uint8
from ..errors import UserError, require
from ..flow import MeanVelocity
from ..hydra_errors import explain
from ..lrn.store import pair_labels, pair_noise
from ..networks import files
from ..paths import conf_dir
from . import guidance as guiding
from .grids import Grid
from .sampler import advise, require_suited, sample, sampling_times
from .solvers import FixedStep, Solver, with_label

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
        field, x = with_label(self.velocity, label), self.times[0] * x1
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
    require(not solver.is_random, "solver", solver, "draws noise in every step, which a program of noise and label cannot")
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


CHECKED = np.arange(3)  #: noise on which a program is compared with the sampler before anyone relies on it


class Settings(NamedTuple):
    """How a program samples."""

    solver: Solver
    grid: Grid
    guidance: guiding.Guidance | guiding.Unguided
    nfe: int
    t_max: float | None


def settings(words: list[str]) -> Settings:
    """What the words say as those of the verb `sample`: `nfe`, `t_max`, members and settings of `inf`; others are refused."""
    for word in words:
        known = re.match(r"[+~]*(nfe|t_max|inf([./]\w+)*)(=|$)", word)
        require(known is not None, "--sampler", word, "a sampler is told nfe, t_max and inf, e.g. nfe=4 inf/solver=heun")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("sample", words)
        solver, grid, how = (instantiate(cfg.inf[part]) for part in ("solver", "grid", "guidance"))
        return Settings(solver, grid, how, cfg.nfe, cfg.t_max)
    except Exception as error:
        line = explain(error, "sample", overrides=words)
        if line is None or isinstance(error, UserError):
            raise
        raise UserError(line) from error


def write(path: Path, words: list[str], out: Path, as_uint8: bool) -> None:
    """Write the sampler of a weight file as a program, float32 on the CPU, and say how far its images are from the sampler's."""
    given, description = settings(words), files.describe(path)
    guided = guiding.check(given.guidance, description, "inf.guidance")
    require_whole_range(guided)
    require_suited(given.solver, description, given.guidance)
    advise(given.solver, description)
    pixels = not as_uint8 or "latents" not in description
    require(pixels, "--uint8", path, "makes latents, and the program does not decode them")
    velocity = guided.velocity(files.load(path), "32-true", torch.device("cpu")).requires_grad_(False)
    t_max = float(description["t_max"]) if given.t_max is None else given.t_max
    how: dict[str, Any] = {"solver": given.solver, "grid": given.grid, "nfe": given.nfe, "t_max": t_max}
    shape, classes = tuple(description["shape"]), int(description["num_classes"])
    made = program(velocity, shape, num_classes=classes, as_uint8=as_uint8, **how)
    apart = difference(made, velocity, shape, classes, as_uint8, how)
    more = {"guidance": guided.recipe, "images": "uint8" if as_uint8 else "float32"}
    save(made, out, protocol(path, description, how) | more)
    size, takes = out.stat().st_size / 1e6, "x1, label" if classes else "x1"
    print(f"{out}: {size:.1f} MB, {given.nfe} NFE; its images differ from the sampler's by at most {apart:.2g}")
    print(f"with torch alone: torch.export.load({str(out)!r}).module()({takes}), x1 noise (n, {', '.join(map(str, shape))})")


def difference(
    made: ExportedProgram, velocity: MeanVelocity, shape: tuple[int, ...], classes: int, as_uint8: bool, how: dict[str, Any]
) -> float:
    """How far some images of a program are from the sampler's, at most."""
    x1, label = pair_noise(0, CHECKED, shape), pair_labels(0, CHECKED, classes)
    images = sample(velocity, x1, label=label, **how)
    found = made.module()(*(values for values in (x1, label) if values is not None))
    return (found.float() - (to_uint8(images) if as_uint8 else images).float()).abs().max().item()


def require_whole_range(guided: guiding.Checked) -> None:
    """Raise a `UserError` for guidance in an interval: which samples it guides is decided while it runs."""
    whole = guided.how is None or (guided.how.low, guided.how.high) == (0, 1)
    allowed = "an interval of times cannot be written out; low=0 and high=1 can"
    require(whole, "inf.guidance", guiding.in_words(guided.recipe), allowed)


def protocol(path: Path, description: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """What a program does and what it was made from."""
    return {
        "weights": files.weights_hash(path),
        "profile": description.get("profile"),
        "solver": repr(how["solver"]),
        "times": sampling_times(**how).tolist(),
        "nfe": how["nfe"],
        "t_max": how["t_max"],
        "shape": description["shape"],
        "num_classes": description["num_classes"],
        "reflow_lab": reflow_lab.__version__,
        "torch": torch.__version__,
    }
