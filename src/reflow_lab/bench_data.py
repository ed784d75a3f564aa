"""`bench data`: images delivered to the training step from memory and from a mapped archive, beside torch's DataLoader.

All read the same zip, made in a temporary folder (TMPDIR), in random batches, and hand over floats on the device. A turn is
more batches than a loader's processes prepare in advance, and about as long for each way, so that what they do in others'
turns counts little.
"""

import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from . import parts
from .bench import QUICKSTART, Sizes, configured, machine, race, ratio
from .data.archive import Archive
from .data.sets import SampleSet, resident, to_float
from .data.zips import encode_png, member_name, write_archive
from .noise import bits

SHAPE = (3, 32, 32)
BATCHES = {"resident": 500, "mapped": 500, "loader_png": 20, "loader_decoded": 100}  #: a turn, a few tenths of a second
WORKERS = 2
PARALLEL = f"_{WORKERS}_workers"


class Zipped(Dataset):
    """PNGs of a zip as a DataLoader usually reads them: opened in each process, decoded when asked for.

    One of these a loader: processes forked from one that has opened the file would share its position.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self.file: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.file = self.file or zipfile.ZipFile(self.path)
        with Image.open(io.BytesIO(self.file.read(member_name(index)))) as image:
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def measure(device: str, sizes: Sizes) -> dict[str, Any]:
    """Images per second of each way, and ours over the DataLoader's with 95 % intervals."""
    cfg = configured(QUICKSTART, device, sizes)
    where, batch = parts.device(cfg), sizes.train_batch
    with tempfile.TemporaryDirectory(prefix="reflow_lab_bench_") as name:
        path, count = Path(name) / "images.zip", sizes.num_decoded
        write_archive(path, map(encode_png, pixels(count)), None)
        held = Archive(str(path)).split("train")
        mapped = Archive(str(path), cache=str(Path(name) / "cache")).split("train")
        decoded = TensorDataset(held.images)
        ways = {
            "resident": ours(resident(held, where), batch, where),
            "mapped": ours(mapped, batch, where),
            "loader_png": loader(Zipped(path, count), batch, where, 0),
            f"loader_png{PARALLEL}": loader(Zipped(path, count), batch, where, WORKERS),
            "loader_decoded": loader(decoded, batch, where, 0),
            f"loader_decoded{PARALLEL}": loader(decoded, batch, where, WORKERS),
        }
        raced = race({key: turn(step, batches(key)) for key, step in ways.items()}, sizes.repeats)
    times = {key: [value / batches(key) for value in values] for key, values in raced.items()}
    rates = {key: batch / float(np.median(values[1:])) for key, values in times.items()}
    over = {
        mine: {theirs: ratio(times[theirs], times[mine]) for theirs in ways if theirs.startswith("loader")}
        for mine in ("resident", "mapped")
    }
    return {"machine": machine(cfg), "batch_size": batch, "num_images": count, "images_per_s": rates, "ours_over_loader": over}


def pixels(count: int) -> np.ndarray:
    """Random images, uint8 (count, *SHAPE)."""
    raw = bits(0, "bench data", np.arange(count), int(np.prod(SHAPE)))
    return (raw >> np.uint64(56)).astype(np.uint8).reshape(count, *SHAPE)


def ours(images: SampleSet, batch: int, device: torch.device) -> Callable[[], object]:
    """A random batch, as the couplings take it."""
    generator = np.random.default_rng(0)
    return lambda: images.take(generator.integers(0, len(images), batch), device)


def loader(images: Dataset, batch: int, device: torch.device, workers: int) -> Callable[[], object]:
    """A random batch by torch's DataLoader, moved as bytes and made floats on the device."""
    pinned = device.type == "cuda"
    made = DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned)
    batches = endless(made)
    return lambda: to_float(next(batches).to(device, non_blocking=pinned))


def endless(made: DataLoader) -> Iterator[Tensor]:
    """One epoch after the other."""
    while True:
        for found in made:
            yield found[0] if isinstance(found, list) else found


def batches(way: str) -> int:
    """How many a turn of it has."""
    return BATCHES[way.removesuffix(PARALLEL)]


def turn(step: Callable[[], object], num: int) -> Callable[[], None]:
    """So many batches."""

    def work() -> None:
        for _ in range(num):
            step()

    return work
