"""Image sets in EDM's format, as EDM's and EDM2's dataset tools write them: a zip or a folder of PNGs and dataset.json."""

import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..artifacts import Artifact, digest, read_json, remove_leftovers, write_atomically, write_json
from ..errors import bad_value, require
from ..progress import Bar
from .folder import MODES
from .sets import ImageSet, content_digest
from .sources import partition, reading, require_room, require_split
from .workers import in_order, sensible_workers
from .zips import LABELS, SIGNATURE, Members, members_of, read_labels

VERSION = 2  #: of what is kept in the cache: increment when the same archive is decoded into something else
MAX_SIDE = 1024  #: pixels; larger images are refused before they are decoded
MAX_BYTES = 16 << 20  #: of a PNG, likewise: four times what an uncompressed one of MAX_SIDE takes
CHUNK = 256  #: images that a worker decodes at a time
FILES_A_WORKER = 50_000  #: about 4 s of decoding
KIND = "a .zip or a folder as EDM's dataset tool or `reflow-lab data` writes it"


@dataclass
class Archive:
    """PNGs of one size with dataset.json: train and reference are the same images, floor is real ones kept apart.

    floor: the path of another archive, or null; train_fraction: the share of the images that is train, the rest being floor
    (at random, the same for every class). With neither there is no floor: that split is empty.
    num_classes = 0: labels are not read. cache: a folder where the decoded images are kept, 1 byte a value, and mapped into
    memory; null: they are decoded into memory each time.
    """

    path: str | None
    floor: str | None = None
    train_fraction: float = 1.0
    channels: int = 3
    resolution: int = 32
    num_classes: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        side = isinstance(self.resolution, int) and 0 < self.resolution <= MAX_SIDE
        require(side, "data.resolution", self.resolution, f"must be 1 to {MAX_SIDE} pixels")
        require(self.channels in MODES, "data.channels", self.channels, "must be 1 (grey) or 3 (RGB)")
        whole = isinstance(self.num_classes, int) and self.num_classes >= 0
        require(whole, "data.num_classes", self.num_classes, "must be the number of classes, or 0 for no labels")
        share = isinstance(self.train_fraction, int | float) and 0 < self.train_fraction <= 1
        require(share, "data.train_fraction", self.train_fraction, "must be above 0 and at most 1")
        twice = self.floor is not None and self.train_fraction < 1
        require(not twice, "data.train_fraction", self.train_fraction, "must be 1 where data.floor names the images kept apart")

    def split(self, name: str) -> ImageSet:
        """The split `train`, `reference` (the same) or `floor`: uint8 (n, channels, resolution, resolution)."""
        require_split(name)
        return self._floor if name == "floor" else self._own[0]

    @cached_property
    def _own(self) -> list[ImageSet]:
        share = float(self.train_fraction)
        return self._open("data.path", self.path, (1.0,) if share == 1 else (share, 1 - share), "train", "floor")

    @cached_property
    def _floor(self) -> ImageSet:
        if self.floor is not None:
            return self._open("data.floor", self.floor, (1.0,), "floor")[0]
        return self._own[1] if self.train_fraction < 1 else self._empty()

    def _empty(self) -> ImageSet:
        labels = torch.empty(0, dtype=torch.int64) if self.num_classes else None
        return ImageSet(torch.empty(0, *self._shape, dtype=torch.uint8), labels, "archive/floor")

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.channels, self.resolution, self.resolution)

    def _open(self, key: str, path: str | None, shares: tuple[float, ...], *names: str) -> list[ImageSet]:
        if path is None:
            raise bad_value(key, "null", f"must name {KIND}")
        job = Job(members_of(path, key, KIND), self._shape, self.num_classes > 0, shares)
        found = decode_into_memory(job) if self.cache is None else decode_into_cache(job, Path(self.cache).expanduser())
        if self.num_classes:
            require_classes(found, key, path, self.num_classes)
        return [replace(held, name=f"archive/{name}") for held, name in zip(found, names, strict=False)]


def require_classes(parts: list[ImageSet], key: str, path: str, num_classes: int) -> None:
    """Raise a `UserError` unless the labels are those of `num_classes` classes; real images kept apart may lack the last ones."""
    found = 1 + max(int(held.labels.max()) for held in parts if held.labels is not None)
    fits = found == num_classes or (found < num_classes and key == "data.floor")
    require(fits, "data.num_classes", num_classes, f"the labels in {path} are 0 to {found - 1}, that is {found} classes")


@dataclass(frozen=True)
class Job:
    """An archive to decode: images of `shape` (c, h, w), labels where `labelled`, cut into parts of these shares."""

    members: Members
    shape: tuple[int, int, int]
    labelled: bool
    shares: tuple[float, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        """What the decoded images depend on."""
        how = {"shape": list(self.shape), "labelled": self.labelled, "shares": list(self.shares)}
        return {"stage": "data", "version": VERSION, "archive": self.members.fingerprint(), **how}


@dataclass(frozen=True)
class Part:
    """Some of an archive's images: their names, in order, and classes, int64 (n,) or None."""

    names: list[str]
    labels: NDArray[np.int64] | None


def survey(job: Job) -> list[Part]:
    """The parts of an archive, when all that can be said before decoding is right; else a `UserError`.

    Each part is in random order, always the same: archives are sorted by class, and the first images should be a sample.
    """
    members, names = job.members, job.members.named(".png")
    members.require(bool(names), f"holds no PNG; it must be {KIND}")
    members.require(LABELS in members.sizes, f"holds no {LABELS}; `reflow-lab data folder` makes an archive of images")
    require_first(job, names[0])
    labels = read_labels(members, names) if job.labelled else None
    members.require(labels is not None or not job.labelled, f"its {LABELS} has no labels: set data.num_classes=0")
    cut = partition(np.zeros(len(names), np.int64) if labels is None else labels, job.shares, "archive")
    empty = f"cannot cut the {len(names)} images in {members.path} in two"
    require(all(len(rows) for rows in cut), "data.train_fraction", f"{job.shares[0]:g}", empty)
    return [Part([names[row] for row in rows], None if labels is None else labels[rows]) for rows in cut]


def require_first(job: Job, name: str) -> None:
    """Raise a `UserError` unless the first image is as large and as colourful as the configuration says."""
    with opened(job.members, name) as image:
        size, mode = image.size, image.mode
    channels, side = job.shape[:2]
    says = f"is {size[0]}x{size[1]} {mode}, but data"
    job.members.require(size == (side, side), f"{says}.resolution={side}", name)
    job.members.require(mode == MODES[channels], f"{says}.channels={channels} needs {MODES[channels]}", name)


def opened(members: Members, name: str) -> Image.Image:
    """A PNG of which only the header was read yet; a `UserError` that names one that is none or larger than MAX_SIDE."""
    raw = members.read(name, MAX_BYTES)
    with reading(members.where(name), "PNG"):
        if not raw.startswith(SIGNATURE):
            raise ValueError("another kind of file")
        width, height = struct.unpack_from(">II", raw, 16)  # Pillow itself only warns of a large image
        small = max(width, height) <= MAX_SIDE
        members.require(small, f"is {width}x{height}, larger than {MAX_SIDE}x{MAX_SIDE}, the largest that is read", name)
        return Image.open(io.BytesIO(raw), formats=("PNG",))


@dataclass(frozen=True)
class Decoder:
    """The work of one process: names to bytes (n, c, h, w)."""

    members: Members
    shape: tuple[int, int, int]

    def __call__(self, names: list[str]) -> NDArray[np.uint8]:
        """Decode these images."""
        return np.stack([self._decode(name) for name in names])

    def _decode(self, name: str) -> NDArray[np.uint8]:
        channels, height, width = self.shape
        with opened(self.members, name) as image, reading(self.members.where(name), "PNG"):
            says = f"is {image.width}x{image.height} {image.mode}, the images before it {width}x{height} {MODES[channels]}"
            self.members.require(image.size == (width, height) and image.mode == MODES[channels], says, name)
            return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def decoded(job: Job, parts: list[Part]) -> Iterator[NDArray[np.uint8]]:
    """The images of all parts, one after the other, some at a time; none spans two parts."""
    tasks = [part.names[first : first + CHUNK] for part in parts for first in range(0, len(part.names), CHUNK)]
    total = sum(len(part.names) for part in parts)
    with Bar(f"decode {job.members.path.name}", total, "images") as bar:
        for block in in_order(Decoder(job.members, job.shape), tasks, sensible_workers(total, FILES_A_WORKER)):
            bar.advance(len(block))
            yield block


def decode_into_memory(job: Job) -> list[ImageSet]:
    """The parts, decoded now."""
    parts = survey(job)
    images = np.empty((sum(len(part.names) for part in parts), *job.shape), np.uint8)
    row = 0
    for block in decoded(job, parts):
        images[row : row + len(block)] = block
        row += len(block)
    labels = np.concatenate([part.labels for part in parts if part.labels is not None]) if job.labelled else None
    return cut_apart(images, labels, [{"size": len(part.names), "hash": None} for part in parts])


def decode_into_cache(job: Job, cache: Path) -> list[ImageSet]:
    """The parts, mapped from files that are made where they are missing."""
    made = Artifact(cache / digest(job.recipe), job.recipe)
    if not made.is_done():
        parts = survey(job)
        with made.locked():
            if not made.is_done():
                _fill(made, job, parts)
    labels = made.folder / "labels.npy"
    images: NDArray[np.uint8] = np.load(made.folder / "images.npy", mmap_mode="r", allow_pickle=False)
    return cut_apart(images, np.load(labels, allow_pickle=False) if job.labelled else None, read_json(made.folder / "parts.json"))


def _fill(made: Artifact, job: Job, parts: list[Part]) -> None:
    sizes = [len(part.names) for part in parts]
    shape = (sum(sizes), *job.shape)
    require_room(made.folder, int(np.prod(shape)) + 8 * shape[0] + 4096, "data.cache", "for the decoded images")
    made.begin()
    remove_leftovers(made.folder, ".*.npy.*.tmp")
    hashes = [content_digest((size, *job.shape), job.labelled) for size in sizes]
    write_atomically(made.folder / "images.npy", lambda path: _write(path, shape, _hashed(decoded(job, parts), sizes, hashes)))
    for part, found in zip(parts, hashes, strict=True):
        if part.labels is not None:
            found.update(part.labels.data)
    if job.labelled:
        labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        write_atomically(made.folder / "labels.npy", lambda path: _write(path, labels.shape, [labels]))
    about = [{"size": size, "hash": found.hexdigest()} for size, found in zip(sizes, hashes, strict=True)]
    write_json(made.folder / "parts.json", about)
    made.finish()


def _write(path: Path, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> None:
    """A .npy file block by block."""
    with path.open("wb") as file:
        for number, block in enumerate(blocks):
            if number == 0:
                kind = np.lib.format.dtype_to_descr(block.dtype)
                np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
            file.write(np.ascontiguousarray(block).data)


def _hashed(blocks: Iterable[NDArray[np.uint8]], sizes: list[int], hashes: list[Any]) -> Iterator[NDArray[np.uint8]]:
    """Pass the blocks on, each having entered the content hash of its part."""
    part, left = 0, sizes[0]
    for block in blocks:
        if left == 0:
            part, left = part + 1, sizes[part + 1]
        hashes[part].update(np.ascontiguousarray(block).data)
        left -= len(block)
        yield block


def cut_apart(images: NDArray[np.uint8], labels: NDArray[np.int64] | None, about: list[dict[str, Any]]) -> list[ImageSet]:
    """The parts of these sizes and content hashes, as views."""
    ends = accumulate((part["size"] for part in about), initial=0)
    held = as_tensor(images)
    classes = None if labels is None else torch.from_numpy(labels)
    cut = [(slice(*both), part["hash"]) for both, part in zip(pairwise(ends), about, strict=True)]
    return [ImageSet(held[rows], None if classes is None else classes[rows], "", found) for rows, found in cut]


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """A tensor over an array that is not to be written to: torch has no word for that, and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(images))
