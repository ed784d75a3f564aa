"""The verb `bench`: what our training step, our sampler and our pairs cost beside bare loops around the same network.

The contenders take turns in one process, so that whatever slows the machine slows all of them. Reported are medians over
the turns, ratios of medians with 95 % intervals (bootstrap over rounds), and ratios of minima, which noise moves least. What
comes every few hundred steps or more rarely, diagnostics and checkpoints, does not show in a median.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Adam

from . import parts
from .arguments import Parser
from .errors import require
from .flow import T_MAX, MeanVelocity, interpolate
from .inf.grids import Uniform
from .inf.sampler import sample, sampling_times
from .inf.solvers import DPM, Euler, Heun, Solver
from .lrn.dropout import scale_dropout
from .networks.precision import InPrecision
from .paths import conf_dir
from .training import train
from .training.ema import EMA

QUICKSTART = ("experiment=quickstart", "dyn=improved", "lrn=improved")
TOY = ("data=two_moons", "net=mlp", "dyn=improved", "dyn/metric=squared_error", "lrn=improved")  # high-pass needs images
TRAIN_RATIO, TOY_OVERHEAD_MS, SAMPLE_RATIO = 1.05, 2.0, 1.03  #: what we want to stay below
ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}

Work = Callable[[], object]
Times = dict[str, list[float]]  #: contender -> seconds a turn, one a round; the first round is a warm-up and not counted


@dataclass(frozen=True)
class Sizes:
    """How much work a bench does; a turn is so many training steps, or one batch of samples."""

    repeats: int = 30
    train_batch: int = 128
    train_steps: int = 4
    toy_steps: int = 50
    sample_batch: int = 64
    nfe: int = 9
    free_steps: int = 100
    num_pairs: int = 1024
    teacher_nfe: int = 35
    num_stored: int = 1_000_000
    read_s: float = 10.0
    num_features: int = 20_000
    num_decoded: int = 50_000


QUICK = Sizes(
    repeats=2,
    train_batch=8,
    train_steps=1,
    toy_steps=2,
    sample_batch=2,
    nfe=3,
    free_steps=5,
    num_pairs=96,
    teacher_nfe=3,
    num_stored=20_000,
    read_s=0.2,
    num_features=1000,
    num_decoded=500,
)


def main(argv: Sequence[str]) -> None:
    """Run one of the benches and print what it found as JSON."""
    args = parser().parse_args(argv)
    require(args.device != "cuda" or torch.cuda.is_available(), "--device", "cuda", "no CUDA device here; allowed: auto, cpu")
    require(args.repeats is None or args.repeats >= 1, "--repeats", args.repeats, "must be at least 1")
    has_folder = args.out is None or args.out.parent.is_dir()
    require(has_folder, "--out", args.out, "its folder does not exist")
    sizes = QUICK if args.quick else Sizes()
    with contextlib.redirect_stdout(sys.stderr):  # nothing but JSON on stdout
        found = BENCHES[args.what](args.device, replace(sizes, repeats=args.repeats or sizes.repeats))
    text = json.dumps({"bench": args.what, **found}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab bench", description="Time our parts against bare loops and other packages; JSON on stdout.")
    made.add_argument("what", choices=list(BENCHES), help="what to time")
    made.add_argument("--repeats", type=int, help=f"turns of each contender (default {Sizes.repeats})")
    made.add_argument("--device", choices=list(ACCELERATORS), default="auto")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works: the figures mean nothing")
    made.add_argument("--out", type=Path, help="write the JSON to this file as well")
    return made


def bench_train(device: str, sizes: Sizes) -> dict[str, Any]:
    """Our training step, all improvements on, two averages, against bare steps: on the quickstart's network and on a toy MLP."""
    images, points = configured(QUICKSTART, device, sizes), configured(TOY, device, sizes)
    raced = race_training(images, sizes.repeats, sizes.train_steps)
    network = report(raced, "ms_per_step", sizes.train_batch, sizes.train_steps, {"ours": TRAIN_RATIO})
    raced = race_training(points, sizes.repeats, sizes.toy_steps)
    toy = report(raced, "ms_per_step", sizes.train_batch, sizes.toy_steps) | {"overhead": overhead(raced, sizes.toy_steps)}
    return {"machine": machine(images), "batch_size": sizes.train_batch, "quickstart": network, "toy_mlp": toy}


def bench_sample(device: str, sizes: Sizes) -> dict[str, Any]:
    """Our sampler against Euler loops of as many calls: of the quickstart's network, and of a field that costs nothing."""
    cfg = configured(QUICKSTART, device, sizes)
    velocity = InPrecision(parts.network(cfg), cfg.precision).to(parts.device(cfg)).eval()
    shape = parts.sample_shape(parts.data_source(cfg))
    solvers: dict[str, Solver] = {"ours_euler": Euler(), "ours_heun": Heun(), "ours_dpm": DPM()}
    x1 = torch.randn(sizes.sample_batch, *shape, device=parts.device(cfg))
    raced = race(ways(velocity, x1, solvers, sizes.nfe), sizes.repeats)
    network = {"nfe": sizes.nfe, **report(raced, "ms_per_batch", len(x1), 1, dict.fromkeys(solvers, SAMPLE_RATIO))}
    x1 = torch.randn(sizes.sample_batch, 3, 32, 32, device=parts.device(cfg))
    drift = torch.randn_like(x1)
    ways_free = ways(lambda x_t, t, s=None, *, label=None, lam_guid=None: drift, x1, {"ours_euler": Euler()}, sizes.free_steps)
    free = {"nfe": sizes.free_steps, **report(race(ways_free, sizes.repeats), "ms_per_batch", len(x1), 1)}
    return {"machine": machine(cfg), "batch_size": len(x1), "quickstart": network, "free_field": free}


def bench_pairs(device: str, sizes: Sizes) -> dict[str, Any]:
    """Drawing pairs against the solver alone, and reading a large store at random."""
    from .bench_pairs import measure  # which builds on this module

    return measure(device, sizes)


def bench_evaluate(device: str, sizes: Sizes) -> dict[str, Any]:
    """Features and Fréchet distance of the same images against torch-fidelity."""
    from .bench_evaluate import measure  # which builds on this module

    return measure(device, sizes)


def bench_data(device: str, sizes: Sizes) -> dict[str, Any]:
    """Images delivered to the training step against torch's DataLoader over the same zip."""
    from .bench_data import measure  # which builds on this module

    return measure(device, sizes)


def bench_flow_map(device: str, sizes: Sizes) -> dict[str, Any]:
    """A step of a flow map against a flow matching step of the same network, the teacher's calls apart."""
    from .bench_flow_map import measure  # which builds on this module

    return measure(device, sizes)


BENCHES: dict[str, Callable[[str, Sizes], dict[str, Any]]] = {
    "train": bench_train,
    "sample": bench_sample,
    "pairs": bench_pairs,
    "evaluate": bench_evaluate,
    "data": bench_data,
    "flow_map": bench_flow_map,
}


def configured(overrides: Sequence[str], device: str, sizes: Sizes) -> DictConfig:
    """The configuration of `reflow-lab train` with these words, at the bench's sizes."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [*overrides, f"trainer.accelerator={ACCELERATORS[device]}"])
    cfg.training.batch_size = sizes.train_batch
    cfg.pairs.num_backward = cfg.pairs.num_forward = sizes.num_pairs
    cfg.pairs.nfe = 1  # an untrained teacher's pairs: not their values count here, but how they are read
    return cfg


def machine(cfg: DictConfig) -> dict[str, Any]:
    """What the figures were measured with."""
    device = parts.device(cfg)
    known = {"device": device.type, "device_name": parts.device_name(cfg), "cores": os.cpu_count()}
    known["threads"] = torch.get_num_threads()
    packages = ("torch", "lightning", "torchcfm", "torchdiffeq", "torchdyn")
    return known | {"precision": cfg.precision, "versions": {p: importlib.metadata.version(p) for p in packages if has(p)}}


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def now() -> float:
    """Seconds, when the GPU, where there is one, has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Work, times: int = 1) -> float:
    """How long it takes to do the work `times` times over."""
    start = now()
    for _ in range(times):
        work()
    return now() - start


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The names, begun at another one each round, so that not always the same one follows the same."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


class Turns(L.Callback):
    """Times the trainer's steps from start to start, with all that Lightning does; after every `steps` the rivals do theirs."""

    def __init__(self, rivals: dict[str, Work], steps: int) -> None:
        self.rivals, self.steps, self.started = rivals, steps, 0.0
        self.times: Times = {name: [] for name in ("ours", *rivals)}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End our turn, let the rivals have theirs, begin our next."""
        if trainer.global_step % self.steps:
            return
        if trainer.global_step:
            self.times["ours"].append(now() - self.started)
            for name in in_turn(list(self.rivals), trainer.global_step // self.steps):
                self.times[name].append(seconds(self.rivals[name], self.steps))
        self.started = now()


def race_training(cfg: DictConfig, repeats: int, steps: int) -> Times:
    """Train as the verb `train` does, in a temporary folder, with the rivals' steps between ours."""
    with tempfile.TemporaryDirectory(prefix="reflow_lab_bench_") as name:
        folder, network, turns = Path(name), parts.network(cfg), Turns(rivals(cfg), steps)
        train.write_weights(cfg, folder, network, EMA([]))  # the teacher of the pairs
        cfg.outputs, cfg.teacher.path, cfg.teacher.profile = name, str(folder / "weights" / "raw.safetensors"), None
        train.optimise(cfg, folder, network, EMA(cfg.training.ema_halflives_mimg), (repeats + 1) * steps + 1, turns)
    return turns.times


def rivals(cfg: DictConfig) -> dict[str, Work]:
    """A bare training step, and one by torchcfm; their images lie ready on the device, the bare one's noise and times too."""
    x0, x1 = torch.randn(2, cfg.training.batch_size, *parts.sample_shape(parts.data_source(cfg)), device=parts.device(cfg))
    t = torch.rand(len(x0), device=x0.device)
    ready = t, interpolate(x0, x1, t), x1 - x0
    made = {"bare": bare_step(cfg, lambda: ready)}
    if has("torchcfm"):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        matcher = ConditionalFlowMatcher(sigma=0.0)
        made["torchcfm"] = bare_step(cfg, lambda: matcher.sample_location_and_conditional_flow(torch.randn_like(x0), x0))
    return made


def bare_step(cfg: DictConfig, draw: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> Work:
    """`step` with the squared error; draw gives t, x_t and the target."""

    def loss(velocity: nn.Module) -> Tensor:
        t, x_t, target = draw()
        return nn.functional.mse_loss(velocity(x_t, t), target)

    return step(cfg, loss)


def step(cfg: DictConfig, loss: Callable[[nn.Module], Tensor]) -> Work:
    """A training step by hand: a loss of a network like ours, backward, and fused Adam."""
    velocity = train.prepared(parts.network(cfg), cfg).to(parts.device(cfg))
    scale_dropout(velocity, cfg.lrn.dropout.fraction)
    optimizer = Adam(velocity.parameters(), lr=cfg.training.lr, fused=True)

    def taken() -> None:
        value = loss(velocity)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()

    return taken


def race(contenders: dict[str, Work], repeats: int, trains: bool = False) -> Times:
    """Time each contender once a round, without gradients unless it `trains`."""
    times: Times = {name: [] for name in contenders}
    with torch.inference_mode(not trains):
        for number in range(repeats + 1):
            for name in in_turn(list(contenders), number):
                times[name].append(seconds(contenders[name]))
    return times


def ways(velocity: MeanVelocity, x1: Tensor, solvers: dict[str, Solver], nfe: int) -> dict[str, Work]:
    """From noise x1 to images by nfe calls: our solvers, and Euler's rule by hand, torchdiffeq, and torchcfm's torchdyn."""

    def ours(solver: Solver) -> Work:
        return lambda: sample(velocity, x1, solver=solver, grid=Uniform(), nfe=nfe)

    made = {name: ours(solver) for name, solver in solvers.items()}
    times = sampling_times(Euler(), Uniform(), nfe).to(x1)
    start = T_MAX * x1
    ready = [(t.expand(len(x1)), dt) for t, dt in zip(times, times.diff().tolist(), strict=False)]

    def bare() -> Tensor:
        x = start
        for t, dt in ready:
            x = x + dt * velocity(x, t)
        return x

    made["bare"] = bare
    if has("torchdiffeq"):
        from torchdiffeq import odeint

        made["torchdiffeq"] = lambda: odeint(lambda t, x: velocity(x, t), start, times, method="euler")[-1]
    if has("torchdyn"):
        from torchdyn.core import NeuralODE

        node = NeuralODE(lambda t, x, args: velocity(x, t), solver="euler")
        made["torchdyn"] = lambda: node.trajectory(start, times)[-1]
    return made


def report(times: Times, unit: str, num_images: int, per_turn: int, targets: dict[str, float] | None = None) -> dict[str, Any]:
    """For each contender its time in ms a step or batch, images a second, and ratio to the bare loop, with targets."""
    found: dict[str, Any] = {"repeats": len(times["bare"]) - 1}
    for name, values in times.items():
        middle, least = (float(f(values[1:])) / per_turn for f in (np.median, np.min))
        found[name] = {unit: 1000 * middle, f"{unit}_min": 1000 * least, "images_per_s": num_images / middle}
        if name != "bare":
            target = (targets or {}).get(name)
            found[name]["over_bare"] = ratio(values, times["bare"]) | ({"target": target} if target else {})
    return found


def ratio(values: list[float], bare: list[float]) -> dict[str, float]:
    """How many times the bare loop's time a contender takes."""
    found, low, high = interval(values, bare, np.divide)
    return {"ratio": found, "ratio_low": low, "ratio_high": high, "ratio_of_minima": min(values[1:]) / min(bare[1:])}


def overhead(times: Times, per_turn: int) -> dict[str, float]:
    """What our step takes beyond the bare one, in ms."""
    found, low, high = (1000 * value / per_turn for value in interval(times["ours"], times["bare"], np.subtract))
    names = ("overhead_ms_per_step", "overhead_low_ms_per_step", "overhead_high_ms_per_step", "target_ms_per_step")
    return dict(zip(names, (found, low, high, TOY_OVERHEAD_MS), strict=True))


def interval(values: list[float], bare: list[float], compare: np.ufunc, num_resamples: int = 2000) -> tuple[float, float, float]:
    """Two medians compared, with the 2.5 and 97.5 % quantiles over resampled rounds."""
    both = np.array((values[1:], bare[1:]))
    rounds = np.random.default_rng(0).integers(both.shape[1], size=(num_resamples, both.shape[1]))
    low, high = np.quantile(compare(*np.median(both[:, rounds], axis=-1)), (0.025, 0.975))
    return float(compare(*np.median(both, axis=-1))), float(low), float(high)
