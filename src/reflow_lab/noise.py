"""Randomness keyed by (seed, stream, index): the same numbers whatever the batch, the worker or the library version.

Bits come from the counter-based generator Philox-4x64-10, one counter range an index, and are shaped by our own
transforms, since the streams of NumPy's and torch's distributions change between versions and devices.
"""

import functools
import hashlib
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def bits(seed: int, stream: str, indices: Indices, words: int) -> NDArray[np.uint64]:
    """Raw Philox bits, (len(indices), words) of 64 each; index i owns the counters [i * blocks, (i + 1) * blocks)."""
    blocks = -(-words // 4)
    source = np.random.Philox(counter=0, key=np.array([seed % 2**64, _stream_key(stream)], dtype=np.uint64))
    raw = np.empty((len(indices), blocks * 4), np.uint64)
    ends = [*(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)] if len(indices) else []
    at = 0  # the counter; advancing one generator is quicker than making one for each run of consecutive indices
    for first, end in pairwise([0, *ends]):
        start = int(indices[first]) * blocks
        source.advance((start - at) % 2**256)
        raw[first:end] = source.random_raw((end - first) * blocks * 4).reshape(-1, blocks * 4)
        at = start + (end - first) * blocks
    return raw[:, :words]


def uniform(seed: int, stream: str, indices: Indices, num: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), float64 (len(indices), num): the centres of 2^52 cells, of which none rounds to 0 or 1."""
    return torch.from_numpy((bits(seed, stream, indices, num) >> np.uint64(12)) * 2.0**-52 + 2.0**-53)


def normal(seed: int, stream: str, indices: Indices, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 (len(indices), *shape), by the Box-Muller transform of 32-bit halves."""
    size = int(np.prod(shape))
    pairs = -(-size // 2)
    halves = bits(seed, stream, indices, pairs).view(np.uint32).reshape(len(indices), pairs, 2)
    u = torch.from_numpy((halves.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32))
    radius = (-2 * u[..., 0].clamp(max=1 - 2.0**-24).log()).sqrt()
    angle = 2 * torch.pi * u[..., 1]
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return both.reshape(len(indices), 2 * pairs)[:, :size].reshape(len(indices), *shape)


def chunks(indices: Indices, size: int) -> list[Indices]:
    """The indices cut into pieces of `size`, the last one shorter."""
    return np.split(indices, range(size, len(indices), size))


@functools.lru_cache(maxsize=8)
def permutation(seed: int, stream: str, size: int) -> Indices:
    """A random order of range(size), by sorting 64 random bits an entry."""
    return np.argsort(bits(seed, stream, np.arange(size), 1)[:, 0], kind="stable")


def batch_indices(seed: int, stream: str, step: int, batch_size: int, size: int) -> Indices:
    """The samples of training step `step`: epochs of fresh permutations of range(size), cut into batches.

    A pure function of the step, so that a resumed run sees the same batches.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // size
    orders = {epoch: permutation(seed, f"{stream}/epoch{epoch}", size) for epoch in np.unique(epochs)}
    return np.concatenate([orders[epoch][positions[epochs == epoch] % size] for epoch in orders])
