"""Distances and scores on the fly: torchmetrics metrics, fed batch by batch, whose state reduces across processes.

They are fed features, not images, so that a batch passes the network once for all of them:

    metrics = MetricCollection([FrechetDistance(reference, network.name), KernelDistance(real, network.name)])
    metrics.update(features=network(images), indices=seeds)
    metrics.compute()  # {"fd_inception": ..., "kid": ..., "kid_std": ...}

Where several processes take part each feeds samples of its own; `indices` are the samples' numbers (their seeds) over all
processes, so that subsets and splits are the same however the samples were dealt out.
"""

import functools
import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..errors import require
from ..noise import bits, permutation
from .frechet import Moments, Reference

Numbers = dict[str, Tensor]  #: name -> scalar, float64
FLOOR = 50  #: samples below which a Fréchet distance is refused
PUBLISHED_INCEPTION = "inception"  #: the one name of features of which a distance may be FID or KID


def kernel_name(network: str) -> str:
    """`kid` of Inception's published features; of any others `kd_NAME`, which is not it."""
    return "kid" if network == PUBLISHED_INCEPTION else f"kd_{network}"


@functools.cache
def warn_of_few(num: int, dim: int) -> None:
    """Say once that a covariance has too few samples for its dimensions."""
    what = "the covariance is singular and the distance biased upwards by a large share"
    print(f"{num} samples for {dim} feature dimensions: {what}; compare with distances of as many samples only", file=sys.stderr)


class FrechetDistance(Metric):
    """The Fréchet distance of samples to a reference (Heusel et al., arXiv:1706.08500), called after its features, `fd_NAME`.

    It bears the name FID only where all of FID's conventions hold, which `targets.distance_name` knows.

    Its state is a count, a sum (d,) and a sum of outer products (d, d), float64: memory does not depend on the number of
    samples, and batches and processes add up in any order. Raises a `UserError` below `floor` samples; warns below d + 1.
    """

    full_state_update = False
    num: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, reference: Reference, network: str, floor: int = FLOOR):
        super().__init__()
        require(floor >= 2, "floor", floor, "a covariance needs at least 2 samples")
        self.reference, self.floor, self.name = reference, floor, f"fd_{network}"
        dim = len(reference.mean)
        self.add_state("num", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Take in features (n, d)."""
        require_dim(features, len(self.reference.mean))
        moments = Moments.of(features)
        self.num += moments.num
        self.total += moments.total.to(self.total.device)
        self.outer += moments.outer.to(self.outer.device)

    def moments(self) -> Moments:
        """What this process has taken in; of all processes while `sync_context` lasts."""
        return Moments(int(self.num), self.total.cpu(), self.outer.cpu())

    def compute(self) -> Numbers:
        """The distance, under its name."""
        num, dim = int(self.num), len(self.reference.mean)
        require(num >= self.floor, "num_images", num, f"a {self.name} needs at least {self.floor} samples")
        if num <= dim:
            warn_of_few(num, dim)
        return {self.name: torch.tensor(self.reference.distance(self.moments()), dtype=torch.float64)}


class _Collecting(Metric):
    """A metric that needs all samples: it keeps vectors, float32 (n, d), with the samples' numbers."""

    full_state_update = False
    kept: list[Tensor]
    numbers: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def keep(self, vectors: Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        """Add vectors (n, d) of the samples with these numbers."""
        require(len(indices) == len(vectors), "indices", len(indices), f"one for each of {len(vectors)} samples")
        self.kept.append(vectors.to(self.device, torch.float32))
        self.numbers.append(torch.as_tensor(indices, dtype=torch.int64, device=self.device))

    def ordered(self) -> Tensor:
        """All vectors in the order of the samples' numbers; one that was seen twice, as by samplers that fill up
        the last batch, counts once."""
        require(len(self.numbers) > 0, "samples", 0, "nothing was given to measure")
        numbers, vectors = dim_zero_cat(self.numbers).cpu().numpy(), dim_zero_cat(self.kept)
        return vectors[torch.from_numpy(np.unique(numbers, return_index=True)[1]).to(self.device)]


class KernelDistance(_Collecting):
    """The kernel distance and its spread over subsets (Binkowski et al., arXiv:1801.01401): KID, if the features are Inception's.

    The unbiased squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, averaged over `num_subsets` pairs of random
    subsets of `subset_size`, drawn by `seed`. Slightly negative values are possible and mean that the sets are very close.

    real: the reference's features, (m, d).
    """

    def __init__(self, real: Tensor, network: str, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0):
        super().__init__()
        require(num_subsets >= 1, "num_subsets", num_subsets, "must be at least 1")
        require(2 <= subset_size <= len(real), "subset_size", subset_size, f"2 to the reference's {len(real)} samples")
        self.real, self.name = real, kernel_name(network)
        self.num_subsets, self.subset_size, self.seed = num_subsets, subset_size, seed

    def update(self, features: Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        """Take in features (n, d) of the samples with these numbers."""
        require_dim(features, self.real.shape[1])
        self.keep(features, indices)

    def compute(self) -> Numbers:
        """Mean and standard deviation over the subsets."""
        made, real, size = self.ordered(), self.real.to(self.device), self.subset_size
        require(len(made) >= size, "subset_size", size, f"at most the {len(made)} samples")

        def drawn(features: Tensor, number: int) -> Tensor:
            return features[subset(self.seed, number, len(features), size).to(features.device)]

        values = [kernel_mmd(drawn(made, 2 * i), drawn(real, 2 * i + 1)) for i in range(self.num_subsets)]
        found = torch.tensor(values, dtype=torch.float64)
        return {self.name: found.mean(), f"{self.name}_std": found.std(correction=0)}


def subset(seed: int, number: int, size: int, chosen: int) -> Tensor:
    """`chosen` of range(size) without replacement: subset `number` of this seed."""
    keys = bits(seed, f"kernel distance/{number}", np.arange(size), 1)[:, 0]
    return torch.from_numpy(np.argpartition(keys, chosen - 1)[:chosen])


def kernel_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of features (m, d) and (n, d), kernel (x.y / d + 1)^3."""
    m, n = len(x), len(y)
    own = sum((k.sum() - k.diagonal().sum()) / (s * (s - 1)) for k, s in ((_kernel(x, x), m), (_kernel(y, y), n)))
    return float(own - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Products in the features' own precision, sums later in float64."""
    return ((x @ y.mT).double() / x.shape[1] + 1) ** 3


class PrecisionRecall(_Collecting):
    """Improved precision and recall (Kynkäänniemi et al., arXiv:1904.06991): shares of samples within the other set's manifold.

    The manifold is the union of balls around its samples that reach to their `neighbours`-th nearest neighbour. Precision:
    generated samples within the real manifold; recall: real samples within the generated one. Both depend on the numbers of
    samples: take as many generated as real ones.

    real: the reference's features, (m, d).
    """

    def __init__(self, real: Tensor, neighbours: int = 3, batch_size: int = 4096):
        super().__init__()
        require(1 <= neighbours < len(real), "neighbours", neighbours, f"1 to {len(real) - 1}, one below the real samples")
        self.real, self.neighbours, self.batch_size = real, neighbours, batch_size

    def update(self, features: Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        """Take in features (n, d) of the samples with these numbers."""
        require_dim(features, self.real.shape[1])
        self.keep(features, indices)

    def compute(self) -> Numbers:
        """Precision and recall, in 0..1."""
        made, real, k = self.ordered(), self.real.to(self.device), self.neighbours
        require(len(made) > k, "neighbours", k, f"must be below the {len(made)} samples")
        return {
            "precision": share_within(made, real, radii(real, k, self.batch_size), self.batch_size),
            "recall": share_within(real, made, radii(made, k, self.batch_size), self.batch_size),
        }


def radii(x: Tensor, k: int, batch_size: int) -> Tensor:
    """Each sample's distance to its k-th nearest neighbour in x (n, d), itself not counted: (n,)."""
    found = [torch.cdist(batch, x).kthvalue(k + 1).values for batch in torch.split(x, batch_size)]
    return torch.cat(found)


def share_within(x: Tensor, centres: Tensor, reach: Tensor, batch_size: int) -> Tensor:
    """The share of x (n, d) within the balls around centres (m, d) of radii `reach` (m,)."""
    inside = [(torch.cdist(batch, centres) <= reach).any(1) for batch in torch.split(x, batch_size)]
    return torch.cat(inside).double().mean()


class InceptionScore(_Collecting):
    """The Inception Score (Salimans et al., arXiv:1606.03498): exp E KL(p(y|x) || p(y)), mean and spread over splits.

    Only Inception's logits make it one, and it knows no reference. The samples are put into a random order first.
    """

    def __init__(self, num_splits: int = 10, seed: int = 0):
        super().__init__()
        require(num_splits >= 1, "num_splits", num_splits, "must be at least 1")
        self.num_splits, self.seed = num_splits, seed

    def update(self, logits: Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        """Take in logits (n, classes) of the samples with these numbers."""
        self.keep(logits, indices)

    def compute(self) -> Numbers:
        """Mean and standard deviation over the splits."""
        logits = self.ordered()
        require(len(logits) >= self.num_splits, "num_splits", self.num_splits, f"at most the {len(logits)} samples")
        order = torch.from_numpy(permutation(self.seed, "inception score", len(logits))).to(self.device)
        scores = torch.stack([inception_score(part) for part in split(logits[order], self.num_splits)])
        return {"inception_score": scores.mean(), "inception_score_std": scores.std(correction=0)}


def split(x: Tensor, num: int) -> list[Tensor]:
    """x cut into `num` pieces at the whole numbers below i n / num."""
    ends = [i * len(x) // num for i in range(num + 1)]
    return [x[first:end] for first, end in pairwise(ends)]


def inception_score(logits: Tensor) -> Tensor:
    """exp E KL(p(y|x) || p(y)) of logits (n, classes), float64."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return (p * (log_p - p.mean(0).log())).sum(1).mean().exp()


def require_dim(features: Tensor, dim: int) -> None:
    """Raise a `UserError` unless features are finite and have the reference's number of dimensions."""
    require(features.ndim == 2 and features.shape[1] == dim, "features", tuple(features.shape), f"(n, {dim}) as the reference")
    require(bool(features.isfinite().all()), "features", "nan or inf", "every feature must be finite")
