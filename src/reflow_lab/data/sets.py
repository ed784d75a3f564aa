"""Samples held in memory: images as bytes, points as floats, with one interface for whoever draws batches.

A set lives on one device and is gathered there by index, so there are neither worker processes nor copies in between.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ..noise import Indices


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats to the nearest byte, clamped to 0..255: the inverse of `to_float`."""
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class SampleSet(ABC):
    """What `ImageSet` and `PointSet` share: length, shape of a sample, gathering by index, a hash of the content."""

    labels: Tensor | None
    name: str

    @property
    @abstractmethod
    def held(self) -> Tensor:
        """All samples as they are stored, (n, ...)."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """A SHA-256 that names the content, whatever path it came from and wherever it lies."""

    @staticmethod
    @abstractmethod
    def to_float(samples: Tensor) -> Tensor:
        """Stored samples as the float32 that networks see."""

    def __len__(self) -> int:
        return len(self.held)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.held.shape[1:])

    def to(self, device: torch.device | str) -> Self:
        """The same set held on another device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]

    def take(self, indices: Tensor | Indices, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """Gather x0, float32 (n, *shape), and its labels, int64 (n,) or None, on `device` (default: where the set lies).

        The samples are gathered and moved as stored (bytes, for images) and converted last.
        """
        where = torch.as_tensor(indices, device=self.held.device)
        samples = self.held.index_select(0, where).to(device)
        labels = None if self.labels is None else self.labels.index_select(0, where).to(device)
        return self.to_float(samples), labels


@dataclass(frozen=True, eq=False)
class ImageSet(SampleSet):
    """Images, uint8 (n, c, h, w), with labels, int64 (n,), or None."""

    images: Tensor
    labels: Tensor | None
    name: str

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4
        assert self.labels is None or (self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1])

    @staticmethod
    def to_float(samples: Tensor) -> Tensor:
        """Bytes as floats in [-1, 1]."""
        return to_float(samples)

    @property
    def held(self) -> Tensor:
        """The images."""
        return self.images

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the shape, the pixels and the labels."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.labels is not None)).encode())
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PointSet(SampleSet):
    """Points, float32 (n, dim), with labels, int64 (n,), or None, made by the rule that `recipe` spells out."""

    points: Tensor
    labels: Tensor | None
    name: str
    recipe: str

    def __post_init__(self) -> None:
        assert self.points.dtype == torch.float32 and self.points.ndim == 2
        assert self.labels is None or (self.labels.dtype == torch.int64 and self.labels.shape == self.points.shape[:1])

    @staticmethod
    def to_float(samples: Tensor) -> Tensor:
        """Points are floats already."""
        return samples

    @property
    def held(self) -> Tensor:
        """The points."""
        return self.points

    @property
    def content_hash(self) -> str:
        """SHA-256 of the recipe, since a logarithm's last bit may differ between processors."""
        return hashlib.sha256(self.recipe.encode()).hexdigest()
