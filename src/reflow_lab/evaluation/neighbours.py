"""Whether samples are copies: their nearest training images, beside those of real images that were not trained on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.sets import SampleSet
from ..noise import chunks

Embed = Callable[[Tensor], Tensor]  #: samples as networks see them, (n, ...), to what distances are taken of, (n, d)


@dataclass(frozen=True)
class Nearest:
    """Of each query the distance to its nearest sample, float64 (n,), and that sample's index, int64 (n,)."""

    distance: Tensor
    index: Tensor


def pixels(samples: Tensor) -> Tensor:
    """Samples as vectors whose Euclidean distance is the root mean square difference, in units of [-1, 1]."""
    return samples.flatten(1) / samples[0].numel() ** 0.5


def none_yet(queries: Tensor) -> Nearest:
    """Of queries (n, d) that have seen no sample."""
    num, where = len(queries), queries.device
    return Nearest(torch.full((num,), torch.inf, dtype=torch.float64, device=where), torch.full((num,), -1, device=where))


def nearer(best: Nearest, queries: Tensor, vectors: Tensor, first: int) -> Nearest:
    """The nearest so far or among these vectors, (m, d), the samples from index `first` on; queries (n, d).

    The nearest of the vectors is found by a matrix product, and its distance then computed from the difference, so that a
    copy has distance 0 and not what rounding leaves.
    """
    index = torch.cdist(queries, vectors, compute_mode="use_mm_for_euclid_dist").argmin(1)
    distance = (queries.double() - vectors[index].double()).norm(dim=1)
    closer = distance < best.distance
    return Nearest(torch.where(closer, distance, best.distance), torch.where(closer, first + index, best.index))


def nearest(
    queries: Mapping[str, Tensor], samples: SampleSet, embeds: Mapping[str, Embed], batch_size: int
) -> Iterable[tuple[int, dict[str, Nearest]]]:
    """The nearest of all samples to each query in each of several spaces, in one pass, batch by batch.

    queries[space], (n, d), lie in the space and on the device of what embeds[space] makes. Yields how many samples were looked
    at and the nearest so far; the last ones are the result. Memory does not grow with the number of samples.
    """
    best = {space: none_yet(vectors) for space, vectors in queries.items()}
    for chunk in chunks(np.arange(len(samples)), batch_size):
        x, _ = samples.take(chunk, "cpu")
        best = {s: nearer(best[s], queries[s], embeds[s](x), int(chunk[0])) for s in queries}
        yield len(chunk), best


class Copies(NamedTuple):
    """How many samples lie nearer to the training images than the nearest 1 % of held-out real ones do.

    threshold: the held-out distance that 1 % of them, `expected`, stay below; share of the samples below it, with its 95 %
    interval low, high (Clopper and Pearson) for this threshold; p_value: the chance of at least as many if samples and
    held-out images had the same law, the threshold's own chance included.
    """

    threshold: float
    expected: float
    share: float
    low: float
    high: float
    p_value: float


def copies(samples: Tensor, held_out: Tensor, quantile: float = 0.01) -> Copies:
    """Compare the nearest distances of samples (n,) with those of held-out real images (m,).

    The threshold is the r-th smallest of the m, r = max(1, round(quantile m)), so that below 100 images it means more than 1 %.
    Under one law the count is beta-binomial, (n, r, m + 1 - r), of mean n r / (m + 1).
    """
    from scipy.stats import betabinom, binomtest

    num, others = len(samples), len(held_out)
    rank = max(1, round(quantile * others))
    threshold = float(held_out.double().sort().values[rank - 1])
    count = int((samples.double() < threshold).sum())
    low, high = binomtest(count, num).proportion_ci()
    p_value = float(betabinom(num, rank, others + 1 - rank).pmf(np.arange(count, num + 1)).sum())  # sf cancels where it is small
    return Copies(threshold, rank / (others + 1), count / num, float(low), float(high), min(p_value, 1.0))
