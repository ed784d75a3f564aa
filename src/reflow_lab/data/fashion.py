"""The embedded default: the 10,000 test images of Fashion-MNIST (Xiao et al. 2017, MIT), shipped inside the package."""

import gzip
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import require
from .sets import ImageSet
from .sources import SPLITS, partition, reading, require_facts, require_split

SIDE = 28
FRACTIONS = (0.5, 0.25, 0.25)  # of every class, in the order of SPLITS


@dataclass
class FashionMNIST:
    """Grey images of clothes, 28 px, padded with background to `resolution` (even, at least 28); 10 classes.

    train 5,000, reference 2,500 and floor 2,500 images: disjoint, equal numbers of every class, in random order.
    """

    channels: int = 1
    resolution: int = 32
    num_classes: int = 10

    def __post_init__(self) -> None:
        require_facts("Fashion-MNIST", vars(self), {"channels": 1, "num_classes": 10})
        fits = isinstance(self.resolution, int) and self.resolution >= SIDE and self.resolution % 2 == 0
        require(fits, "data.resolution", self.resolution, f"must be an even number of pixels, at least {SIDE}, for Fashion-MNIST")

    def split(self, name: str) -> ImageSet:
        """The split `train`, `reference` or `floor`: uint8 (n, 1, resolution, resolution)."""
        require_split(name)
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, ImageSet]:
        folder = files("reflow_lab.data") / "fashion_mnist"
        margin = (self.resolution - SIDE) // 2
        images = np.pad(read_idx(folder / "t10k-images-idx3-ubyte.gz"), ((0, 0), (margin, margin), (margin, margin)))
        labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int64)
        parts = zip(SPLITS, partition(labels, FRACTIONS, "fashion_mnist"), strict=True)
        return {name: _image_set(images[part], labels[part], name) for name, part in parts}


def _image_set(images: NDArray[np.uint8], labels: NDArray[np.int64], split: str) -> ImageSet:
    return ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(labels), f"fashion_mnist/{split}")


def read_idx(file: Traversable) -> NDArray[np.uint8]:
    """Read an idx.gz file of bytes: two zeros, the type 8, the number of dimensions, each as a big-endian int32, the data."""
    with reading(str(file), "idx.gz file of bytes"):
        raw = gzip.decompress(file.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {raw[:3]!r}")
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
