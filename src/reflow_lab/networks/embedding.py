"""Embeddings of time and class label."""

import torch
from torch import Tensor, nn


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


class Conditioning(nn.Module):
    """Time (n,) and, for a conditional network, label (n,), as one embedding (n, dim)."""

    def __init__(self, dim: int, num_classes: int = 0) -> None:
        super().__init__()
        self.time = nn.Sequential(FourierTime(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes, dim) if num_classes else None

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        """The embedding (n, dim)."""
        embedding = self.time(t)
        return embedding if self.label is None else embedding + self.label(label)
