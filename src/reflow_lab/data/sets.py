"""Samples in memory or mapped from a file: images as bytes, points as floats, with one interface for whoever draws batches.

A set lies in one place and is gathered there by index, so there are neither worker processes nor copies in between. What is
too large for a GPU stays on the host and only batches move, as bytes.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ..noise import Indices

RESIDENT_SHARE = 0.25  #: of a GPU's free memory: ImageNet at 64 pixels, 16 GB as bytes, lies on one of 80 GB

Set = TypeVar("Set", bound="SampleSet")


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats to the nearest byte, clamped to 0..255: the inverse of `to_float`."""
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; to CUDA by pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def content_digest(shape: tuple[int, ...], labelled: bool) -> Any:
    """The hash of an image set's content, begun: all pixels, then all labels where there are some, are to enter it."""
    return hashlib.sha256(repr((shape, labelled)).encode())


class SampleSet(ABC):
    """What `ImageSet`, `PointSet` and `LatentSet` share: length, shape of a sample, gathering by index, a hash of the content."""

    labels: Tensor | None
    name: str
    destination: torch.device | None

    @property
    @abstractmethod
    def held(self) -> Tensor:
        """All samples as they are stored, (n, ...)."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """A SHA-256 that names the content, whatever path it came from and wherever it lies."""

    @abstractmethod
    def to_float(self, samples: Tensor) -> Tensor:
        """Stored samples as the float32 that networks see."""

    def __len__(self) -> int:
        return len(self.held)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.held.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where batches are delivered: `destination`, or by default where the set lies."""
        return self.destination or self.held.device

    def to(self, device: torch.device | str) -> Self:
        """The same set held on another device."""
        held = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **held, destination=None)  # type: ignore[type-var]

    def delivered(self, device: torch.device | str) -> Self:
        """The same set held where it lies, whose batches are delivered to another device."""
        return replace(self, destination=torch.device(device))  # type: ignore[type-var]

    def take(self, indices: Tensor | Indices, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """Gather x0, float32 (n, *shape), and its labels, int64 (n,) or None, on `device` (default: the set's).

        The samples are gathered and moved as stored (bytes, for images) and converted last.
        """
        stored, labels = self.gather(indices, device)
        return self.to_float(stored), labels

    def drawn(self, indices: Indices, seed: int, positions: Indices) -> tuple[Tensor, Tensor | None]:
        """As `take`, for training: what is random in a sample, as in `LatentSet`, is drawn anew, keyed by (seed, position)."""
        return self.take(indices)

    def gather(self, indices: Tensor | Indices, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """These samples as they are stored, and their labels, on `device` (default: the set's)."""
        where = torch.as_tensor(indices, device=self.held.device)
        target = self.device if device is None else device
        labels = None if self.labels is None else moved(self.labels.index_select(0, where), target)
        return moved(self.held.index_select(0, where), target), labels


@dataclass(frozen=True, eq=False)
class ImageSet(SampleSet):
    """Images, uint8 (n, c, h, w), with labels, int64 (n,), or None; `known_hash`: the content's, where it is known already."""

    images: Tensor
    labels: Tensor | None
    name: str
    known_hash: str | None = None
    destination: torch.device | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4
        assert self.labels is None or (self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1])

    def to_float(self, samples: Tensor) -> Tensor:
        """Bytes as floats in [-1, 1]."""
        return to_float(samples)

    @property
    def held(self) -> Tensor:
        """The images."""
        return self.images

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the shape, the pixels and the labels."""
        if self.known_hash is not None:
            return self.known_hash
        digest = content_digest(tuple(self.images.shape), self.labels is not None)
        for tensor in (self.images, self.labels):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return str(digest.hexdigest())


@dataclass(frozen=True, eq=False)
class PointSet(SampleSet):
    """Points, float32 (n, dim), with labels, int64 (n,), or None, made by the rule that `recipe` spells out."""

    points: Tensor
    labels: Tensor | None
    name: str
    recipe: str
    destination: torch.device | None = None

    def __post_init__(self) -> None:
        assert self.points.dtype == torch.float32 and self.points.ndim == 2
        assert self.labels is None or (self.labels.dtype == torch.int64 and self.labels.shape == self.points.shape[:1])

    def to_float(self, samples: Tensor) -> Tensor:
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


def resident(samples: Set, device: torch.device | str) -> Set:
    """The set on the device, if it takes at most RESIDENT_SHARE of a GPU's free memory; else where it is, delivered to it."""
    target = torch.device(device)
    if target.type != "cuda":
        return samples.to(target)
    free, _ = torch.cuda.mem_get_info(target)
    fits = samples.held.nbytes <= RESIDENT_SHARE * free
    return samples.to(target) if fits else samples.delivered(target)
