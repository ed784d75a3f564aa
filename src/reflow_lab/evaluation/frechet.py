"""The Fréchet distance of two feature sets, from running moments; by its features' name (`fd_lite0`), never FID."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Chunked(Protocol):
    """Rows (n, d) that are read a chunk at a time, in order, as often as need be: what a tensor is that need not be in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


Features = Tensor | Chunked  #: float (n, d)


@dataclass(frozen=True)
class Moments:
    """Running first and second moments of feature vectors, float64: count, sum (d,), sum of outer products (d, d)."""

    num: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Features) -> Self:
        """The moments of features (n, d), a chunk at a time, so that no float64 copy of all of them is made."""
        dim = features.shape[1]
        total, outer = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        for chunk in _chunks(features):
            total += chunk.sum(0)
            outer.addmm_(chunk.mT, chunk)
        return cls(len(features), total, outer)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        return Moments(self.num + other.num, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """The mean, (d,)."""
        return self.total / self.num

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance, (d, d). Raises ValueError below two samples."""
        if self.num < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples a set, not {self.num}")
        return (self.outer - self.num * self.mean.outer(self.mean)) / (self.num - 1)


class Linearised(NamedTuple):
    """A Fréchet distance and its derivative by each sample's relative weight, float64 (n,), of mean 0."""

    distance: float
    influence: Tensor


@dataclass(frozen=True)
class Reference:
    """One side of many Fréchet distances: its square root is taken once, then each distance costs one `eigvalsh`."""

    mean: Tensor
    cov: Tensor
    root: Tensor
    inverse_root: Tensor

    @classmethod
    def of(cls, features: Features | Moments) -> Self:
        """The reference of features (n, d) or of their moments."""
        moments = features if isinstance(features, Moments) else Moments.of(features)
        return cls.given(moments.mean, moments.cov)

    @classmethod
    def given(cls, mean: Tensor, cov: Tensor) -> Self:
        """The reference of a mean (d,) and an unbiased covariance (d, d), float64."""
        values, vectors = _positive_eigh(cov)
        root, inverse_root = ((vectors * values**power) @ vectors.mT for power in (0.5, -0.5))
        return cls(mean, cov, root, inverse_root)

    def distance(self, features: Features | Moments) -> float:
        """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), A and B the unbiased covariances (Dowson and Landau 1982).

        It is the W2^2 of `gaussian.w2_squared`. With few samples it is biased upwards: compare equal numbers of samples only.
        """
        moments = features if isinstance(features, Moments) else Moments.of(features)
        return self._distance(moments, torch.linalg.eigvalsh(self._product(moments)).clamp(min=0))

    def linearise(self, features: Features, own: Features | None = None) -> Linearised:
        """The distance to features (n, d) and its derivative, by which `intervals.linear_bootstrap` resamples it.

        dFD = 2 dm.(m_b - m_a) + tr((1 - T) dB) with T = A^1/2 M^-1/2 A^1/2, M = A^1/2 B A^1/2, the optimal map from B to A;
        likewise for A with T^-1. own: this reference's features, where its sample i shares the noise of sample i of
        `features` and is resampled with it; None where the reference stays fixed.
        """
        moments = Moments.of(features)
        values, vectors = _positive_eigh(self._product(moments))
        shift = moments.mean - self.mean
        influence = _influence(features, moments.mean, shift, (vectors * values**-0.25).mT @ self.root)
        if own is not None:
            influence += _influence(own, self.mean, -shift, (vectors * values**0.25).mT @ self.inverse_root)
        return Linearised(self._distance(moments, values), influence)

    def _product(self, moments: Moments) -> Tensor:
        if moments.mean.shape != self.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(moments.mean)} dimensions have no Fréchet distance")
        return self.root @ moments.cov @ self.root

    def _distance(self, moments: Moments, values: Tensor) -> float:
        traces = self.cov.trace() + moments.cov.trace() - 2 * values.sqrt().sum()
        return max(float((self.mean - moments.mean).square().sum() + traces), 0.0)


def _positive_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding error and their vectors: with fewer samples than dimensions the rest mean nothing."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[keep], vectors[:, keep]


def _chunks(features: Features, size: int = 1024) -> Iterator[Tensor]:
    chunks: Iterable[Tensor] = torch.split(features, size) if isinstance(features, Tensor) else features
    return (chunk.to("cpu", torch.float64) for chunk in chunks)


def _influence(features: Features, mean: Tensor, shift: Tensor, half_map: Tensor) -> Tensor:
    """2 shift.y + c (|y|^2 - |half_map y|^2), less its mean, y = features - mean; c of the unbiased covariance."""
    correction = len(features) / (len(features) - 1)

    def of(y: Tensor) -> Tensor:
        return 2 * y @ shift + correction * (y.square().sum(1) - (y @ half_map.mT).square().sum(1))

    influence = torch.cat([of(chunk - mean) for chunk in _chunks(features)])
    return influence - influence.mean()
