"""A small U-Net for development runs: pixel-unshuffled, so that two CPU cores train it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from .attention import scaled_dot_product
from .edm import GroupNorm
from .embedding import Aim, Conditioning


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a residual branch as the identity (DDPM)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def group_norm(channels: int) -> GroupNorm:
    """Group normalisation with 8 channels a group."""
    return GroupNorm(channels // 8, channels)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions; the embedding scales and shifts between them (ADM)."""

    def __init__(self, channels_in: int, channels_out: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * channels_out)
        self.norm2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, channels_in, h, w) to (n, channels_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class SelfAttention(nn.Module):
    """Multi-head self-attention over pixels, residual."""

    def __init__(self, channels: int, head_dim: int = 32) -> None:
        super().__init__()
        self.num_heads = math.gcd(channels, max(1, channels // head_dim))
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.num_heads, -1, h * w).transpose(-1, -2).unbind(1)
        attended = scaled_dot_product(q, k, v)
        return x + self.out(attended.transpose(-1, -2).reshape(n, c, h, w))


class UNet(nn.Module):
    """F(x, t, label): (n, c, h, w) to the same shape.

    `patch` x `patch` pixels are folded into channels first. Level i has `num_blocks` blocks of `channels * multipliers[i]`
    channels on each side, at `resolution / patch / 2^i` pixels; each block's output is a skip to its mirror image.
    Self-attention sits in the middle. `channels` is a multiple of 8. `augment_dim` is the length of the augmentation label.
    With `jumps` it is a flow map's.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        num_classes: int = 0,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        num_blocks: int = 1,
        patch: int = 2,
        dropout: float = 0.1,
        augment_dim: int = 0,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.resolution, self.num_classes, self.patch = in_channels, resolution, num_classes, patch
        self.jumps = jumps
        require(channels % 8 == 0, "channels", channels, "must be a multiple of 8")
        factor = patch * 2 ** (len(multipliers) - 1)
        require(resolution % factor == 0, "resolution", resolution, f"must be a multiple of {factor} for this network")
        dim, widths = 2 * channels, [channels * m for m in multipliers]
        self.conditioning = Conditioning(dim, num_classes, jumps)
        self.map_augment = nn.Linear(augment_dim, dim, bias=False) if augment_dim else None
        self.stem = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for below, width in zip([channels, *widths], widths, strict=False):
            self.encoder.append(
                nn.ModuleList(ResBlock(below if i == 0 else width, width, dim, dropout) for i in range(num_blocks))
            )
            self.decoder.insert(0, nn.ModuleList(ResBlock(2 * width, width, dim, dropout) for _ in range(num_blocks)))
        self.downs = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        self.ups = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.middle = ResBlock(widths[-1], widths[-1], dim, dropout)
        self.attention = SelfAttention(widths[-1])
        self.head_norm = group_norm(channels)
        self.head = zero_init(nn.Conv2d(channels, in_channels * patch**2, 3, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None, aim: Aim | None = None
    ) -> Tensor:
        """F(x, t, label): x (n, c, h, w), t (n,), label (n,) or None, augment (n, augment_dim) or None; aim for a flow map."""
        embedding = self.conditioning(t, label, aim)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = F.silu(embedding)
        h, skips = self.stem(F.pixel_unshuffle(x, self.patch)), []
        for level, blocks in enumerate(self.encoder):
            h = self.downs[level - 1](h) if level else h
            for block in blocks.children():
                h = block(h, embedding)
                skips.append(h)
        h = self.attention(self.middle(h, embedding))
        for level, blocks in enumerate(self.decoder):
            h = self.ups[level - 1](F.interpolate(h, scale_factor=2.0)) if level else h
            for block in blocks.children():
                h = block(torch.cat((h, skips.pop()), dim=1), embedding)
        return F.pixel_shuffle(self.head(F.silu(self.head_norm(h))), self.patch)
