"""Improvement 5: the joint distribution of (x0, x1) that a flow is trained on.

A coupling is stateless in everything but the training step: `batch(step)` is a pure function, so a resumed run sees the
same batches. `Mixture` is what a configuration names; opened on its sources it becomes a coupling.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data.augment import AUGMENT_DIM, UNCHANGED, Augmentation
from ..data.sets import SampleSet, moved
from ..errors import require
from ..noise import Indices, batch_indices, normal

HELD_OUT = 2**48  #: where the noise of held-out images begins: training never comes so far
STOCHASTIC = ("independent", "minibatch_ot")  #: an image with fresh noise: x_t does not determine the pair
STORED = ("backward", "forward", "projected")  #: kept in a store
KINDS = (*STOCHASTIC, *STORED, "online")  #: what a mixture may hold


class Batch(NamedTuple):
    """Pairs: x0 data and x1 noise, (n, ...) float32; label (n,) int64 or None; augment: labels (n, 9) float32 or None."""

    x0: Tensor
    x1: Tensor
    label: Tensor | None
    augment: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """All of it on one device."""
        label, augment = (None if extra is None else moved(extra, device) for extra in self[2:])
        return Batch(moved(self.x0, device), moved(self.x1, device), label, augment)


class Coupling(Protocol):
    """Draws of (x0, x1, label), a pure function of the step."""

    def batch(self, step: int) -> Batch:
        """The batch of a training step: of several processes that train together, this one's rows of the global batch."""
        ...


class Pairs(Protocol):
    """Random access to pairs: stored ones (`PairStore`), images with fresh noise, or a teacher at work (`OnlinePairs`)."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices, position: int) -> Batch:
        """The pairs of these indices; `position` is the global number of the first sample drawn."""
        ...


@dataclass(frozen=True)
class IndependentPairs:
    """An image with fresh noise each time it is drawn: the coupling of a base flow. Held-out images stay as they are."""

    stream: ClassVar[str] = "coupling/independent"
    images: SampleSet
    seed: int
    augmentation: Augmentation = UNCHANGED

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Indices, position: int) -> Batch:
        """x1 and what is done to x0 are keyed by the sample's position in training, not by its image."""
        positions = np.arange(position, position + len(indices))
        x0, label = self.images.drawn(indices, self.seed, positions)
        x1 = normal(self.seed, self.stream, positions, self.images.shape)
        augmentation = self.augmentation if position < HELD_OUT else UNCHANGED
        x0, augment = augmentation(x0, self.seed, self.stream, positions)
        return Batch(x0, x1, label, augment).to(x0.device)


def assignment(x0: Tensor, x1: Tensor, label: Tensor | None = None) -> Tensor:
    """The permutation p, int64 (n,), that minimises sum_i ||x0_i - x1_p(i)||^2, for x0 and x1 (n, ...).

    With labels (n,) x1_i belongs to the class of x0_i, and p stays within the classes.

    The squares do not depend on p, so it maximises the sum of the inner products. Exact (shortest augmenting paths), with
    the matrix about 1 ms on one core at n = 128; at n = 512 about 50 ms for images and 150 ms for points in the plane.
    """
    gain = x0.flatten(1) @ x1.flatten(1).mT
    if label is not None:
        gain = gain.masked_fill(label[:, None] != label, -1e6 * (1 + gain.abs().max().item()))
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])


@dataclass(frozen=True)
class MinibatchOTPairs(IndependentPairs):
    """Images of a batch with the fresh noise that an optimal assignment gives each (Pooladian et al. 2023, Tong et al. 2024).

    For a conditional flow `by_class`: across classes the noise of a class would no longer be N(0, I), which sampling draws.

    What is read together is assigned together: the global batch's share of this kind, and the held-out pairs among themselves.
    """

    stream: ClassVar[str] = "coupling/minibatch_ot"
    by_class: bool = False

    def read(self, indices: Indices, position: int) -> Batch:
        """Labels stay with their images; the cost is the squared distance."""
        batch = super().read(indices, position)
        order = assignment(batch.x0, batch.x1, batch.label if self.by_class else None)
        return batch._replace(x1=batch.x1[order.to(batch.x1.device)])


@dataclass(frozen=True)
class Draws:
    """A coupling that visits rows [first, first + size) of its pairs in fresh random orders, `batch_size` a step.

    `position` is the global number of its first sample, by which fresh noise is keyed. Only the batch's rows
    `own` are read, by default all.
    """

    pairs: Pairs
    name: str
    batch_size: int
    seed: int
    first: int
    size: int
    position: int = 0
    own: range | None = None

    def batch(self, step: int) -> Batch:
        """See `Coupling`."""
        own = range(self.batch_size) if self.own is None else self.own
        rows = batch_indices(self.seed, f"coupling/{self.name}", step, self.batch_size, self.size)[own.start : own.stop]
        return self.pairs.read(self.first + rows, self.position + step * self.batch_size + own.start)


@dataclass(frozen=True)
class Fresh:
    """A coupling that takes its pairs one after the other and none twice, `batch_size` a step, from `position` on.

    Only the batch's rows `own` are read.
    """

    pairs: Pairs
    batch_size: int
    own: range
    position: int = 0

    def batch(self, step: int) -> Batch:
        """See `Coupling`."""
        first = self.position + step * self.batch_size + self.own.start
        return self.pairs.read(np.arange(first, first + len(self.own)), first)


@dataclass(frozen=True)
class Rows:
    """Some rows, or none, of another coupling's batches."""

    coupling: Coupling
    own: range

    def batch(self, step: int) -> Batch:
        """See `Coupling`."""
        x0, x1, label, augment = self.coupling.batch(step)
        cut = slice(self.own.start, self.own.stop)
        return Batch(x0[cut], x1[cut], None if label is None else label[cut], None if augment is None else augment[cut])


@dataclass(frozen=True)
class Mixed:
    """Several couplings side by side in one batch."""

    parts: tuple[Coupling, ...]

    def batch(self, step: int) -> Batch:
        """See `Coupling`; labels come only where every part has them, augmentation labels where one has (0: not augmented)."""
        batches = [part.batch(step) for part in self.parts]
        if len(batches) == 1:
            return batches[0]
        x0, x1, label, augment = zip(*batches, strict=True)
        labels = None if any(y is None for y in label) else torch.cat(label)
        done = [x.new_zeros(len(x), AUGMENT_DIM) if a is None else a for x, a in zip(x0, augment, strict=True)]
        return Batch(torch.cat(x0), torch.cat(x1), labels, torch.cat(done) if any(a is not None for a in augment) else None)


class Prefetched:
    """A coupling that draws the next step's batch in a thread while the present one is used, so that a GPU need not wait.

    The batches stay the same, since each is a function of its step alone; an error surfaces at its step.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.thread = coupling, ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[Batch]] = {}  #: at most one, under its step

    def batch(self, step: int) -> Batch:
        """See `Coupling`."""
        found = self.ahead.get(step) or self._draw(step)
        self.ahead = {step + 1: self._draw(step + 1)}
        return found.result()

    def _draw(self, step: int) -> Future[Batch]:
        return self.thread.submit(self.coupling.batch, step)


def intersections(sizes: Mapping[str, int], rows: range) -> dict[str, range]:
    """Of parts of these sizes, one after the other in a batch, the rows of each, counted from its start, that are in `rows`."""
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    starts = {kind: ends[kind] - size for kind, size in sizes.items()}

    def clipped(row: int, kind: str) -> int:
        return min(max(row - starts[kind], 0), sizes[kind])

    return {kind: range(clipped(rows.start, kind), clipped(rows.stop, kind)) for kind in sizes}


def shares(weights: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Whole numbers of samples a batch, in proportion to the weights, by largest remainder; they add up to the batch."""
    total = sum(weights.values())
    exact = {kind: batch_size * weight / total for kind, weight in weights.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: batch_size - sum(counts.values())]:
        counts[kind] += 1
    return {kind: count for kind, count in counts.items() if count}


class Mixture:
    """A weighted mixture of the kinds of pairs (Simple ReFlow, LRN); the paper's ratio is unknown, so sweep the weights.

    The weights need not add up to one. A batch holds each kind in proportion, rounded to whole samples.
    """

    def __init__(
        self,
        independent: float = 0,
        minibatch_ot: float = 0,
        backward: float = 0,
        forward: float = 0,
        projected: float = 0,
        online: float = 0,
    ) -> None:
        given = dict(zip(KINDS, (independent, minibatch_ot, backward, forward, projected, online), strict=True))
        for kind, weight in given.items():
            require(weight >= 0, f"lrn.coupling.{kind}", weight, "a weight must be at least 0")
        self.weights = {kind: weight for kind, weight in given.items() if weight > 0}
        require(bool(self.weights), "lrn.coupling", given, f"at least one of {', '.join(KINDS)} must be positive")

    @property
    def stochastic(self) -> list[str]:
        """The kinds in it whose pairs x_t does not determine."""
        return [kind for kind in self.weights if kind in STOCHASTIC]

    def require_room(self, sizes: Mapping[str, int], batch_size: int, num_heldout: int) -> None:
        """Raise a `UserError` if a batch would lack a kind, or hold more of one than its source has beside the held-out pairs."""
        counts, heldout = shares(self.weights, batch_size), shares(self.weights, num_heldout)
        for kind, weight in self.weights.items():
            none = f"is too small a weight: it gives no {kind} sample in a batch of {batch_size}"
            require(kind in counts, f"lrn.coupling.{kind}", weight, none)
            room = sizes[kind] - heldout.get(kind, 0)
            allowed = f"takes {counts[kind]} {kind} samples a batch, but only {room} can be had beside the held-out ones"
            require(counts[kind] <= room, "training.batch_size", batch_size, allowed)

    def open(
        self, sources: Mapping[str, Pairs], batch_size: int, seed: int, num_heldout: int, rows: range | None = None
    ) -> tuple[Coupling, Coupling]:
        """The coupling to train on and one of `num_heldout` pairs kept out of it (the last of every source).

        Of each training batch it draws only the `rows` of this process; of the held-out ones all.
        """
        sizes = {kind: len(sources[kind]) for kind in self.weights}
        self.require_room(sizes, batch_size, num_heldout)
        counts, heldout = shares(self.weights, batch_size), shares(self.weights, num_heldout)

        def draws(kind: str, count: int, own: range, first: int, size: int, position: int = 0) -> Coupling:
            whole = range(count if kind == "minibatch_ot" else 1)  # what is assigned together cannot be drawn in pieces
            if len(own) < len(whole):  # and nothing at all cannot be drawn from a network
                return Rows(draws(kind, count, whole, first, size, position), own)
            if kind == "online":
                return Fresh(sources[kind], count, own, position)
            return Draws(sources[kind], kind, count, seed, first, size, position, own)

        own = intersections(counts, range(batch_size) if rows is None else rows)
        train = [draws(k, c, own[k], 0, sizes[k] - heldout.get(k, 0)) for k, c in counts.items()]
        held = [draws(k, c, range(c), sizes[k] - c, c, HELD_OUT) for k, c in heldout.items()]
        return Mixed(tuple(train)), Mixed(tuple(held))
