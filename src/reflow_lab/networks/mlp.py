"""An MLP for points, such as the 2-D toys."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .embedding import Aim, Conditioning


class MLP(nn.Module):
    """F(x, t, label): (n, dim) to the same shape; `num_layers` hidden layers of `width`; a flow map's if it `jumps`."""

    def __init__(
        self,
        dim: int,
        num_classes: int = 0,
        width: int = 128,
        num_layers: int = 3,
        dropout: float = 0.0,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_classes, self.jumps = dim, num_classes, jumps
        self.conditioning = Conditioning(64, num_classes, jumps)
        sizes = [dim + 64] + [width] * num_layers
        hidden = [nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Dropout(dropout)) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, aim: Aim | None = None) -> Tensor:
        """F(x, t, label): x (n, dim), t (n,), label (n,) or None; aim for a flow map."""
        return self.layers(torch.cat((x, self.conditioning(t, label, aim)), dim=1))
