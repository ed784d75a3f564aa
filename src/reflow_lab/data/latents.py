"""Latents of images as a data source: what `reflow-lab data imagenet512` made, mapped into memory.

A network sees latents. Distances are between images: samples are decoded first (`Latents.decode`) and measured against original
images, as EDM2 does, so that what the autoencoder loses counts. Held-out latents, decoded, therefore make the floor: what a
perfect flow on these latents would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifacts import Artifact, digest, read_json
from ..errors import bad_value, require
from ..noise import Indices, normal
from .archive import as_tensor
from .autoencoder import MEAN, STABLE_DIFFUSION, STD, Codec
from .sets import ImageSet, SampleSet, moved
from .sources import SPLIT_SEED, require_split

KIND = "a folder that `reflow-lab data imagenet512` made"
STAGE = "latents"


@dataclass(frozen=True, eq=False)
class LatentSet(SampleSet):
    """Latents as their mean and standard deviation, float16 (n, 2c, h, w); a sample is drawn, mean + std z, then standardised.

    `take` draws the same one each time; `drawn`, for training, another one each time.
    """

    stream: ClassVar[str] = "latents"
    moments: Tensor
    labels: Tensor | None
    name: str
    known_hash: str
    codec: Codec
    destination: torch.device | None = None

    def __post_init__(self) -> None:
        assert self.moments.dtype == torch.float16 and self.moments.ndim == 4 and self.moments.shape[1] % 2 == 0
        assert self.labels is None or (self.labels.dtype == torch.int64 and self.labels.shape == self.moments.shape[:1])

    @property
    def held(self) -> Tensor:
        """Means and standard deviations."""
        return self.moments

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one latent, (c, h, w)."""
        both, height, width = self.moments.shape[1:]
        return (both // 2, height, width)

    @property
    def content_hash(self) -> str:
        """By the files' checksums, the rows of this split and the standardisation."""
        return self.known_hash

    def to_float(self, samples: Tensor) -> Tensor:
        """Their means, standardised."""
        return self.codec.standardised(samples.float().chunk(2, dim=1)[0])

    def take(self, indices: Tensor | Indices, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """One latent of each image, always the same: its noise is keyed by the index."""
        stored, labels = self.gather(indices, device)
        return self._sample(stored, SPLIT_SEED, f"{self.stream}/{self.name}", np.asarray(indices)), labels

    def drawn(self, indices: Indices, seed: int, positions: Indices) -> tuple[Tensor, Tensor | None]:
        """A latent of each image whose noise is keyed by the place in training, as the flow's own is."""
        stored, labels = self.gather(indices)
        return self._sample(stored, seed, self.stream, positions), labels

    def _sample(self, stored: Tensor, seed: int, stream: str, keys: Indices) -> Tensor:
        mean, std = stored.float().chunk(2, dim=1)
        return self.codec.standardised(mean + std * moved(normal(seed, stream, keys, self.shape), stored.device))


@dataclass
class Latents:
    """Latents of a folder that `reflow-lab data imagenet512` made: train, and floor of those kept apart; reference: originals.

    autoencoder: the one that made them, a folder or a name on the hub; it is loaded when something is decoded. mean, std: of the
    raw latents, by channel. floor: another such folder, or null; train_fraction: the share of the latents that is train, the
    rest being floor (they lie in random order). The original images that the folder keeps are some of train's, as bytes.
    """

    path: str | None
    autoencoder: str = STABLE_DIFFUSION
    floor: str | None = None
    train_fraction: float = 1.0
    channels: int = 4
    resolution: int = 64
    num_classes: int = 1000
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __post_init__(self) -> None:
        for key, low in (("channels", 1), ("resolution", 1), ("num_classes", 0)):
            value = getattr(self, key)
            require(isinstance(value, int) and value >= low, f"data.{key}", value, f"must be a whole number of at least {low}")
        for key in ("mean", "std"):
            numbers = list(getattr(self, key))
            fits = len(numbers) == self.channels and all(isinstance(number, int | float) for number in numbers)
            require(fits, f"data.{key}", numbers, f"must be one number for each of data.channels={self.channels}")
        require(min(self.std) > 0, "data.std", list(self.std), "must be positive")
        share = isinstance(self.train_fraction, int | float) and 0 < self.train_fraction <= 1
        require(share, "data.train_fraction", self.train_fraction, "must be above 0 and at most 1")
        twice = self.floor is not None and self.train_fraction < 1
        require(not twice, "data.train_fraction", self.train_fraction, "must be 1 where data.floor names the latents kept apart")

    def split(self, name: str) -> LatentSet | ImageSet:
        """The split `train` or `floor`, latents (channels, resolution, resolution), or `reference`, original images as bytes."""
        require_split(name)
        if name == "train":
            return self._own.latents("train", 0, self._num_train)
        if name == "reference":
            return self._own.originals(self._num_train)
        kept = self._own if self.floor is None else self._kept_apart
        return kept.latents("floor", self._num_train if self.floor is None else 0, kept.num)

    @property
    def codec(self) -> Codec:
        """How these latents become images."""
        return self._own.codec

    def decode(self, samples: Tensor) -> Tensor:
        """Latents as images in [-1, 1]; images, as the reference's are, stay."""
        is_latent = tuple(samples.shape[1:]) == (self.channels, self.resolution, self.resolution)
        return self.codec.decode(samples) if is_latent else samples

    @property
    def _num_train(self) -> int:
        cut = int(self.train_fraction * self._own.num + 1e-9)
        cannot = f"leaves no latent of {self._own.num} on one side"
        require(cut > 0 and (self.train_fraction == 1 or cut < self._own.num), "data.train_fraction", self.train_fraction, cannot)
        return cut

    @cached_property
    def _own(self) -> "Folder":
        return self._open("data.path", self.path)

    @cached_property
    def _kept_apart(self) -> "Folder":
        found = self._open("data.floor", self.floor)
        ours, theirs = (folder.made.recipe["autoencoder"] for folder in (self._own, found))
        require(ours == theirs, "data.floor", self.floor, f"was made by the autoencoder {theirs}, data.path by {ours}")
        return found

    def _open(self, key: str, path: str | None) -> "Folder":
        if path is None:
            raise bad_value(key, "null", f"must name {KIND}")
        folder = Path(path).expanduser()
        there = (folder / "recipe.json").is_file()
        require(there, key, path, f"no latents there ({folder.absolute()}); it must be {KIND}")
        made = Artifact(folder, read_json(folder / "recipe.json"))
        require(made.recipe.get("stage") == STAGE, key, path, f"holds something else; it must be {KIND}")
        require(made.is_done(), key, path, "is not finished; the same `reflow-lab data` command goes on with it")
        self._require_fitting(made.recipe, key, path)
        weights = made.recipe["autoencoder"]
        return Folder(made, Codec(self.autoencoder, tuple(self.mean), tuple(self.std), weights), self.num_classes > 0)

    def _require_fitting(self, recipe: dict[str, Any], key: str, path: str) -> None:
        wanted, found = [self.channels, self.resolution, self.resolution], recipe["shape"]
        require(wanted == found, key, path, f"holds latents of {found}, data.channels and data.resolution say {wanted}")
        classes = recipe["num_classes"]
        fits = self.num_classes in (0, classes) or (classes < self.num_classes and key == "data.floor")
        require(fits, "data.num_classes", self.num_classes, f"{path} has {classes or 'no'} classes")


@dataclass
class Folder:
    """A finished folder of latents: latents.npy, originals.npy, labels.npy where there are classes, all in one random order."""

    made: Artifact
    codec: Codec
    labelled: bool

    @property
    def num(self) -> int:
        """How many latents it has."""
        return int(self.made.recipe["count"])

    @cached_property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file."""
        return {name: about[1] for name, about in read_json(self.made.folder / "done.json")["files"].items()}

    def mapped(self, name: str) -> Tensor:
        """A file, mapped into memory."""
        array: NDArray[Any] = np.load(self.made.folder / name, mmap_mode="r", allow_pickle=False)
        return as_tensor(array)

    def labels(self, first: int, end: int) -> Tensor | None:
        """The classes of some rows."""
        return self.mapped("labels.npy")[first:end] if self.labelled else None

    def named(self, *files: str, **more: Any) -> str:
        """The content hash of what is made of some of the files, and of the labels where they are read."""
        read = (*files, "labels.npy") if self.labelled else files
        return digest({"files": {name: self.checksums[name] for name in read}, **more})

    def latents(self, name: str, first: int, end: int) -> LatentSet:
        """These rows' latents."""
        code = {key: value for key, value in self.codec.about.items() if key != "autoencoder"}
        content = self.named("latents.npy", rows=[first, end], split=name, codec=code)
        return LatentSet(self.mapped("latents.npy")[first:end], self.labels(first, end), f"latents/{name}", content, self.codec)

    def originals(self, most: int) -> ImageSet:
        """The original images that are kept, those of the first rows, at most so many."""
        images = self.mapped("originals.npy")[:most]
        content = self.named("originals.npy", rows=len(images))
        return ImageSet(images, self.labels(0, len(images)), "latents/reference", content)
