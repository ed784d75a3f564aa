"""`bench data`: images delivered to the training step from memory and from a mapped archive, beside torch's DataLoader.

All read the same zip, made in a temporary folder (TMPDIR), in random batches, and hand over floats on the device. A turn is
several batches, more than the loader's processes prepare in advance, so that what they do in others' turns counts little.
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
BATCHES = 20  #: a turn
WORKERS = 2


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
            f"loader_png_{WORKERS}_workers": loader(Zipped(path, count), batch, where, WORKERS),
            "loader_decoded": loader(decoded, batch, where, 0),
            f"loader_decoded_{WORKERS}_workers": loader(decoded, batch, where, WORKERS),
        }
        times = race({key: turn(step) for key, step in ways.items()}, sizes.repeats)
    rates = {key: BATCHES * batch / float(np.median(values[1:])) for key, values in times.items()}
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


def turn(step: Callable[[], object]) -> Callable[[], None]:
    """Several batches."""

    def work() -> None:
        for _ in range(BATCHES):
            step()

    return work
