"""`bench flow_map`: what a step of a flow map costs over a flow matching step of the same network, in time and memory.

The teacher of the raced steps costs nothing, so that the ratios are the student's alone; what a real one's call costs, and a weak
guide's, is timed beside them: a step makes one of each. The quickstart's network, in float32.
"""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from . import parts
from .bench import QUICKSTART, Sizes, Times, Work, bare_step, configured, machine, race, ratio, seconds, step
from .flow import interpolate
from .flow_maps.distillation import Distillation
from .networks.precision import InPrecision
from .noise import uniform
from .training import distil

TARGETS = {"exact": 2.0, "finite_difference": 1.5}  #: times a flow matching step
STEPS = {f"{objective}_{derivative}": (objective, derivative) for objective in ("emd", "lmd") for derivative in TARGETS}


def measure(device: str, sizes: Sizes) -> dict[str, Any]:
    """All figures, as JSON-able values, with the targets beside them."""
    cfg = chosen(device, sizes, "emd", "exact")
    contenders = {name: made(device, sizes) for name, made in makers().items()}
    times = race(contenders, sizes.repeats, trains=True)
    memory = {name: in_own_process(name, device, sizes) for name in ("flow_matching", *STEPS)}
    found = {name: figures(name, times) | ({"peak_mb": memory[name]} if name in memory else {}) for name in times}
    return {"machine": machine(cfg), "batch_size": sizes.train_batch, "targets": TARGETS, **found}


def chosen(device: str, sizes: Sizes, objective: str, derivative: str) -> DictConfig:
    """The quickstart's flow map."""
    words = ("precision=32-true", f"flow_map/objective={objective}", f"flow_map/derivative={derivative}")
    cfg = configured((f"{QUICKSTART[0]}_flow_map", *words), device, sizes)
    parts.settle_net(cfg)
    return cfg


def makers() -> dict[str, Callable[[str, Sizes], Work]]:
    """How to make each contender."""
    called = dict.fromkeys(("teacher", "weak_guide"), called_alone)  # the same network: a weaker one costs what its size costs
    return {"flow_matching": flow_matching, **{name: flow_map_step(*of) for name, of in STEPS.items()}, **called}


def drawn(cfg: DictConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise and the numbers u of a step, ready on the device."""
    x0, x1 = torch.randn(2, cfg.training.batch_size, *parts.sample_shape(parts.data_source(cfg)), device=parts.device(cfg))
    return x0, x1, uniform(0, "bench/flow_map", np.arange(len(x0)), Distillation.num_uniform).to(x0.device)


def flow_matching(device: str, sizes: Sizes) -> Work:
    """A flow matching step of the flow map's network."""
    cfg = chosen(device, sizes, "emd", "exact")
    x0, x1, u = drawn(cfg)
    t = u[:, 0].to(x0)
    return bare_step(cfg, lambda: (t, interpolate(x0, x1, t), x1 - x0))


def flow_map_step(objective: str, derivative: str) -> Callable[[str, Sizes], Work]:
    """How to make a step of a flow map whose teacher's velocity lies ready."""

    def made(device: str, sizes: Sizes) -> Work:
        cfg = chosen(device, sizes, objective, derivative)
        x0, x1, u = drawn(cfg)
        v = x1 - x0
        objective_ = Distillation(distil.matching(cfg), instantiate(cfg.flow_map.times), lambda *_, **__: v)
        return step(cfg, lambda velocity: objective_(velocity, x0, x1, u).total.mean())

    return made


def called_alone(device: str, sizes: Sizes) -> Work:
    """One call of a velocity as training calls its teacher."""
    cfg = chosen(device, sizes, "emd", "exact")
    velocity: nn.Module = InPrecision(parts.network(cfg), cfg.precision).to(parts.device(cfg)).eval()
    x0, x1, u = drawn(cfg)
    t = u[:, 0].to(x0)

    def call() -> None:
        with torch.no_grad():
            velocity(interpolate(x0, x1, t), t)

    return call


def figures(name: str, times: Times) -> dict[str, Any]:
    """The time of a contender, its spread, and how often a flow matching step's it is."""
    ms = 1000 * np.array(times[name][1:])
    found: dict[str, Any] = {"ms": float(np.median(ms)), "ms_min": float(ms.min()), "ms_max": float(ms.max()), "repeats": len(ms)}
    if name != "flow_matching":
        found |= ratio(times[name], times["flow_matching"])
    return found | ({"target": TARGETS[STEPS[name][1]]} if name in STEPS else {})


def in_own_process(name: str, device: str, sizes: Sizes) -> float:
    """What `peak_mb` finds in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_mb, name, device, sizes).result()


def peak_mb(name: str, device: str, sizes: Sizes) -> float:
    """Memory that three steps of a contender take at their peak, MB: of the GPU, or of this process above what it had before."""
    work = makers()[name](device, sizes)
    if torch.cuda.is_available() and device != "cpu":
        seconds(work, 3)
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident_mb()
    seconds(work, 3)
    return resident_mb() - before


def resident_mb() -> float:
    """The most physical memory that this process has had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")
