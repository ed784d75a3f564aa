"""What sampling costs whoever runs it: milliseconds an image and peak memory, by batch size and number of calls."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import peak_memory_mb


class Cost(NamedTuple):
    """One cell: medians of `ms` (of each repeat, milliseconds an image), and the peak memory of a batch in MB (10^6 bytes)."""

    batch_size: int
    nfe: int
    ms_per_image: float
    peak_memory_mb: float
    ms: list[float]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes; on CUDA until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def cost(make: Callable[[], Tensor], velocity: object, device: torch.device, batch_size: int, nfe: int, repeats: int) -> Cost:
    """The cost of `make`, which makes `batch_size` images by `nfe` calls of `velocity`.

    A first call warms up, a second is watched for its memory (see `peak_memory_mb`: what it counts differs between CPU and CUDA),
    the others are timed. Noise should lie on the device before.
    """
    make()
    _, memory = peak_memory_mb(make, velocity, device)
    ms = [1000 * seconds(make, device) / batch_size for _ in range(repeats)]
    return Cost(batch_size, nfe, statistics.median(ms), memory, ms)


def markdown(found: Sequence[Cost], asked: Sequence[tuple[int, int]], device: str) -> str:
    """Two tables, time and memory, a row a batch size, a column a number of calls; asked for and not found: no memory."""
    time_table = _table(asked, "ms an image", {(c.batch_size, c.nfe): f"{c.ms_per_image:.3g}" for c in found})
    memory_table = _table(asked, "peak memory, MB", {(c.batch_size, c.nfe): f"{c.peak_memory_mb:.4g}" for c in found})
    return f"Sampling on {device}\n\n{time_table}\n\n{memory_table}\n"


def _table(asked: Sequence[tuple[int, int]], title: str, cells: Mapping[tuple[int, int], str]) -> str:
    sizes, calls = (list(dict.fromkeys(pair[i] for pair in asked)) for i in (0, 1))
    head = f"| {title} | " + " | ".join(f"{n} NFE" for n in calls) + " |\n|---|" + "---:|" * len(calls)
    rows = [f"| batch {size} | " + " | ".join(cells.get((size, n), "no memory") for n in calls) + " |" for size in sizes]
    return "\n".join([head, *rows])
