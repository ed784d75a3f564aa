"""Embeddings of time and class label."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import NO_LABEL, T_CLAMP


class FourierTime(nn.Module):
    """Sines and cosines of t (n,) at `dim / 2` frequencies, geometric from 1/4 to `max_frequency` periods on [0, 1]; (n, dim).

    The largest frequency bounds the derivative in t, which flow maps differentiate through.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_frequency: float = 64.0) -> None:
        super().__init__()
        exponents = torch.linspace(0, 1, dim // 2, device="cpu")
        self.register_buffer("frequencies", 2 * torch.pi * 0.25 * (4 * max_frequency) ** exponents, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """The features (n, dim), float32."""
        angles = t.float()[:, None] * self.frequencies.to(t.device)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class Aim(NamedTuple):
    """What a flow map's network is told beside t: the time s at which to arrive, and how strongly its teacher is guided."""

    s: Tensor  #: (n,)
    lam_guid: Tensor  #: (n,), 1 is no guidance


class Jump(nn.Module):
    """Where a flow map starts and arrives, and the guidance of its teacher (Align Your Flow), as features (n, dim).

    They stand where a velocity has its own features of time. Those have large derivatives in t, that of ln(sigma) infinite ones
    at both ends, and a flow map learns from its derivative: here t goes in as it is, at low frequencies, and `time` is first
    aligned with what it replaces (flow_maps/alignment.py). What s and lam_guid contribute starts at zero: a fresh flow map is the
    velocity that it is made from, whatever s.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = FourierTime(64, max_frequency=2.0)
        self.time = mlp(FourierTime(64, max_frequency=2.0), 64, dim)
        self.aim = mlp(nn.Identity(), 3 * 64, dim)
        for parameter in self.aim[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, aim: Aim) -> Tensor:
        """The features (n, dim), float32."""
        told = self.aim(torch.cat([self.features(z) for z in (aim.s, t - aim.s, aim.lam_guid / 4)], dim=1))
        return self.time(t) + told


def features_of_time(own: Callable[[Tensor], Tensor], jump: Jump | None, t: Tensor, aim: Aim | None) -> Tensor:
    """A velocity's own features of time, or those of a flow map's jump in their place."""
    if jump is None:
        return own(t)
    assert aim is not None, "a flow map wants to know where to arrive"
    features: Tensor = jump(t, aim)
    return features


def mlp(features: nn.Module, width: int, dim: int) -> nn.Sequential:
    """Features (n, width), one hidden layer, (n, dim)."""
    return nn.Sequential(features, nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, dim))


class TimeEmbedder(Protocol):
    """The part of a network that knows time: features of it, and the layer that takes them."""

    jump: Jump | None  #: of a flow map

    def time_features(self, t: Tensor, aim: Aim | None = None) -> Tensor:
        """The features of time (n, dim)."""
        ...

    def first(self, features: Tensor) -> Tensor:
        """What the first layer after the features makes of them, without a label."""
        ...


class Conditioning(nn.Module):
    """Time (n,) and, for a conditional network, label (n,), as one embedding (n, dim); of a flow map also its aim."""

    def __init__(self, dim: int, num_classes: int = 0, jumps: bool = False) -> None:
        super().__init__()
        self.time = nn.Sequential(FourierTime(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes, dim) if num_classes else None
        self.jump = Jump(dim) if jumps else None

    def time_features(self, t: Tensor, aim: Aim | None = None) -> Tensor:
        """What stands for time (n, dim)."""
        return features_of_time(self.time, self.jump, t, aim)

    def first(self, features: Tensor) -> Tensor:
        """They are used as they are."""
        return features

    def forward(self, t: Tensor, label: Tensor | None, aim: Aim | None = None) -> Tensor:
        """The embedding (n, dim); NO_LABEL adds nothing to that of time."""
        embedding = self.time_features(t, aim)
        if self.label is None:
            return embedding
        assert label is not None, "a conditional network wants labels"
        return embedding + torch.where((label == NO_LABEL)[:, None], 0.0, self.label(label.clamp(min=0)))


def c_noise(t: Tensor) -> Tensor:
    """EDM's noise label ln(sigma) / 4 at sigma = t / (1 - t) (arXiv 2206.00364, table 1); t (n,) in [0, 1], float64 (n,).

    It is infinite at both ends, so times within T_CLAMP of an end, where no training comes, count as T_CLAMP and 1 - T_CLAMP.
    """
    return torch.logit(t.double(), eps=T_CLAMP) / 4


class PositionalNoise(nn.Module):
    """Sines and cosines of a noise label (n,) at `dim / 2` frequencies, geometric from 1 to 1/10000; (n, dim).

    DDPM's positional encoding (arXiv 2006.11239): DDPM++ reaches the last frequency and puts the sines first, ADM stops one
    short of it and puts the cosines first.
    """

    def __init__(self, dim: int, reaches_end: bool, sines_first: bool) -> None:
        super().__init__()
        self.dim, self.reaches_end, self.sines_first = dim, reaches_end, sines_first

    def forward(self, label: Tensor) -> Tensor:
        """The features (n, dim), of the label's dtype."""
        half = self.dim // 2
        exponents = torch.arange(half, device=label.device, dtype=label.dtype) / (half - self.reaches_end)
        angles = label[:, None] * 10000.0**-exponents
        return torch.cat((angles.sin(), angles.cos()) if self.sines_first else (angles.cos(), angles.sin()), dim=1)


class FourierNoise(nn.Module):
    """Sines, then cosines, of a noise label (n,) at `dim / 2` random frequencies N(0, 16^2) (NCSN++, arXiv 2011.13456)."""

    freqs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("freqs", 16 * torch.randn(dim // 2))

    def forward(self, label: Tensor) -> Tensor:
        """The features (n, dim), of the label's dtype."""
        angles = 2 * torch.pi * label[:, None] * self.freqs.to(label.dtype)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


def one_hot(label: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Labels (n,) as rows (n, num_classes) of `like`'s dtype; NO_LABEL, or None, is a row of zeros, EDM's way to ask for none."""
    if label is None:
        return like.new_zeros(like.shape[0], num_classes)
    return F.one_hot(label - NO_LABEL, 1 + num_classes)[:, 1:].to(like.dtype)
