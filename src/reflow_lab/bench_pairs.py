"""`bench pairs`: what drawing pairs costs beside the solver alone, and how fast a large store is read at random.

The large store is real: as many pairs as asked for, drawn by a velocity that costs nothing, in a temporary folder (TMPDIR).
It is read in fresh processes of one thread, as training reads it: random batches, noise regenerated.
"""

import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from . import parts
from .artifacts import Artifact, artifact, file_hash
from .bench import QUICKSTART, Sizes, configured, machine, race, ratio, seconds
from .errors import require
from .filling import conditions, threads
from .flow import MeanVelocity
from .inf.sampler import sample
from .lrn.couplings import Draws
from .lrn.pairs import solve
from .lrn.store import PairStore, fill, pair_noise
from .networks.precision import InPrecision
from .noise import Indices, chunks
from .shards import DTYPES, decode, encode

SHAPE = (3, 32, 32)  #: of the large store's images
SMALL = 10_000  #: pairs of the store that the large one's memory is compared with
TARGETS = {"throughput": 0.98, "pairs_per_s": 20_000, "open_s": 1.0, "growth_mb": 200}
EULER = {"_target_": "reflow_lab.inf.solvers.Euler"}
UNIFORM = {"_target_": "reflow_lab.inf.grids.Uniform"}


def measure(device: str, sizes: Sizes) -> dict[str, Any]:
    """All figures, as JSON-able values, with the targets beside them."""
    needed, free = sizes.num_stored * int(np.prod(SHAPE)), shutil.disk_usage(tempfile.gettempdir()).free
    room = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; TMPDIR names another folder"
    require(needed < free, "TMPDIR", tempfile.gettempdir(), room)
    with tempfile.TemporaryDirectory(prefix="reflow_lab_bench_") as name:
        drawn, small, large = generation(device, sizes, Path(name)), min(SMALL, sizes.num_stored), sizes.num_stored
        stores = {count: large_store(Path(name), count, sizes) for count in (small, large)}
    growth = stores[large]["anonymous_mb"] - stores[small]["anonymous_mb"]
    found: dict[str, Any] = {"generation": drawn, "stores": {str(count): values for count, values in stores.items()}}
    found |= {"anonymous_memory_growth_mb": growth, "noise": noise_rates(), "rounding": rounding(device, sizes)}
    return {"machine": machine(configured(QUICKSTART, device, sizes)), "targets": TARGETS, **found}


def large_store(folder: Path, count: int, sizes: Sizes) -> dict[str, float]:
    """A store drawn by a velocity that costs nothing: pairs/s of drawing, and of reading it in a process of its own."""
    made = recipe(folder, "free", count, SHAPE, "uint8", batch_size=500, nfe=1)
    taken = seconds(lambda: generate(made, free_velocity, torch.device("cpu")))
    return {"generated_per_s": count / taken, **in_own_process(made.folder, sizes)}


def free_velocity(
    x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
) -> Tensor:
    """0, at no cost."""
    return torch.zeros((), dtype=x_t.dtype, device=x_t.device).expand_as(x_t)


def recipe(outputs: Path, name: str, count: int, shape: tuple[int, ...], dtype: str, batch_size: int, nfe: int) -> Artifact:
    """A backward store without a teacher's file behind it."""
    rules = {
        "solver": EULER,
        "grid": UNIFORM,
        "nfe": nfe,
        "t_max": 80 / 81,
        "num_classes": 0,
        "start_noise": False,
        "flips": False,
    }
    store = {"kind": "backward", "half": "x0", "count": count, "shape": list(shape), "seed": 1, "batch_size": batch_size}
    shard_size = min(max(4 * batch_size, count // 20), 50_000)
    return artifact(outputs, "pairs", 0, name=name, dtype=dtype, shard_size=shard_size, **rules, **store)


def generate(made: Artifact, velocity: MeanVelocity, device: torch.device) -> None:
    """Fill a store as the verb `pairs` does."""
    unused: Any = None  # backward pairs refer to no images

    def draw(indices: Indices) -> Iterator[Tensor]:
        return solve(velocity, made.recipe, unused, indices, device)

    assert fill(made, draw, conditions(device))


def generation(device: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """A store, first byte to done-mark, against the same solver on noise that is there: pairs/s of both and their ratio."""
    cfg = configured(QUICKSTART, device, sizes)
    velocity = InPrecision(parts.network(cfg), cfg.precision).to(parts.device(cfg)).eval()
    shape, count = parts.sample_shape(parts.data_source(cfg)), 8 * sizes.sample_batch
    how = {"batch_size": sizes.sample_batch, "nfe": sizes.teacher_nfe}
    ready = [pair_noise(1, chunk, shape).to(parts.device(cfg)) for chunk in chunks(np.arange(count), sizes.sample_batch)]
    rules: dict[str, Any] = {"solver": instantiate(EULER), "grid": instantiate(UNIFORM), "nfe": sizes.teacher_nfe}
    turn = iter(range(10**6))

    def ours() -> None:
        generate(recipe(folder, f"turn {next(turn)}", count, shape, "float16", **how), velocity, parts.device(cfg))

    times = race({"ours": ours, "bare": lambda: [sample(velocity, x1, **rules) for x1 in ready]}, sizes.repeats)
    slower = ratio(times["ours"], times["bare"])
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    call_ms = 1000 * medians["bare"] / (len(ready) * sizes.teacher_nfe)
    throughput = {"throughput": 1 / slower["ratio"], "low": 1 / slower["ratio_high"], "high": 1 / slower["ratio_low"]}
    rates = {f"{name}_pairs_per_s": count / value for name, value in medians.items()}
    return {"batch_size": sizes.sample_batch, "nfe": sizes.teacher_nfe, "ms_per_call": call_ms, **rates, **throughput}


def in_own_process(folder: Path, sizes: Sizes) -> dict[str, float]:
    """What `read_at_random` finds, measured in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(read_at_random, folder, sizes.read_s).result()


def read_at_random(folder: Path, duration_s: float) -> dict[str, float]:
    """Open a store and read random batches of 256 on one thread: s to open, pairs/s, peak anonymous memory in MB.

    From shortly before the end of an epoch, so that the orders of two epochs are held.
    """
    torch.set_num_threads(1)
    pair_noise(0, np.arange(1), SHAPE)  # what the first use of a library loads is not the store's
    start = time.perf_counter()
    store = PairStore(folder)
    store.read(np.array([len(store) - 1]))
    opened = time.perf_counter() - start
    coupling, step = Draws(store, "bench", 256, seed=0, first=0, size=len(store)), len(store) // 256 - 20
    first = step
    for number in (step, step + 40):
        coupling.batch(number)
    for shard in store.manifest["shards"]:
        file_hash(folder / shard["file"])  # into the page cache
    start, peak = time.perf_counter(), 0.0
    while (taken := time.perf_counter() - start) < duration_s:
        coupling.batch(step)
        step, peak = step + 1, max(peak, anonymous_mb()) if step % 20 == 0 else peak
    return {"open_s": opened, "read_per_s": (step - first) * 256 / taken, "anonymous_mb": max(peak, anonymous_mb())}


def anonymous_mb() -> float:
    """This process's anonymous memory: mapped files, whose pages the system can drop, do not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def noise_rates() -> dict[str, float]:
    """Noise of pairs at random, pairs/s on one thread: ours by index, and NumPy's Philox generator, which knows no index."""
    indices = np.random.default_rng(0).integers(0, 10**6, 256)
    generator = np.random.Generator(np.random.Philox(0))
    ways = {
        "ours": lambda: pair_noise(1, indices, SHAPE),
        "numpy": lambda: generator.standard_normal((256, *SHAPE), dtype=np.float32),
    }
    with threads(1):
        times = race(ways, 10)
    return {name: 256 / float(np.median(values[1:])) for name, values in times.items()}


def rounding(device: str, sizes: Sizes) -> dict[str, dict[str, float]]:
    """What storing the shipped teacher's images costs: rms and largest error by type, where grey levels are 2/255 apart."""
    cfg = configured(QUICKSTART, device, sizes)
    cfg.pairs.nfe = sizes.teacher_nfe
    made = {"kind": "backward", "num_classes": 0, "seed": 1, "batch_size": sizes.sample_batch, "start_noise": False}
    made |= {key: parts.plain(cfg.pairs[key]) for key in ("solver", "grid", "nfe")} | {"t_max": parts.teacher(cfg).t_max}
    made |= {"shape": list(parts.sample_shape(parts.data_source(cfg)))}
    unused: Any = None  # backward pairs refer to no images
    velocity, indices = parts.teacher(cfg).velocity(cfg), np.arange(4 * sizes.sample_batch)
    x0 = torch.cat(list(solve(velocity, made, unused, indices, parts.device(cfg)))).cpu()
    errors = {dtype: decode(encode(x0, dtype)) - x0 for dtype in DTYPES}
    found = {d: {"rms": e.square().mean().sqrt().item(), "largest": e.abs().max().item()} for d, e in errors.items()}
    found["uint8"]["share_beyond_range"] = (x0.abs() > 1).float().mean().item()
    return found
