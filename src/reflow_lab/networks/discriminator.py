"""What tells samples from data: StyleGAN2's discriminator (arXiv 1912.04958), and the same idea for points."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..flow import NO_LABEL
from .skeleton import resample

TAPS = (1, 3, 3, 1)  #: of the filter before every downsampling
LAST_SIDE = 4  #: pixels, where the blocks end


class Scaled(nn.Module):
    """A linear layer, or with a `kernel` a convolution, at an equalised learning rate (arXiv 1710.10196).

    The stored weights are N(0, 1), and are divided by the root of their number an output when used: so Adam, whose steps know no
    scale, changes all layers at the same relative speed.
    """

    def __init__(self, channels_in: int, channels_out: int, *kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *kernel))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, ...) to (n, channels_out, ...)."""
        weight = self.weight / math.sqrt(self.weight[0].numel())
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class Leaky(nn.Module):
    """Leaky ReLU of slope 0.2, times sqrt(2), which keeps the magnitude of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Block(nn.Module):
    """Two 3x3 convolutions with a filtered downsampling between them; a filtered 1x1 skip is added, the sum over sqrt(2).

    StyleGAN2 filters as well and strides its second convolution; this one is on half the side at once.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(Scaled(channels_in, channels_in, 3, 3), Leaky())
        self.second = nn.Sequential(Scaled(channels_in, channels_out, 3, 3), Leaky())
        self.skip = Scaled(channels_in, channels_out, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) to (n, channels_out, h / 2, w / 2)."""
        h = self.second(resample(self.first(x), "down", TAPS))
        return (h + self.skip(resample(x, "down", TAPS))) / math.sqrt(2)


def group(num: int, most: int) -> int:
    """The size of the groups that `num` samples fall into: the largest divisor of at most `most`."""
    return max(size for size in range(1, min(num, most) + 1) if num % size == 0)


def with_minibatch_std(x: Tensor, most: int) -> Tensor:
    """x (n, c, ...) with one more channel, by which a discriminator sees how much samples differ (arXiv 1710.10196, section 3).

    It is the standard deviation over a group of samples, averaged over channels and pixels. Groups are consecutive rows, at most
    `most` (`group`): several processes that split a batch have the same ones, if each has a multiple of their size.
    """
    groups = x.reshape(-1, group(len(x), most), *x.shape[1:])
    std = (groups.var(dim=1, correction=0) + 1e-8).sqrt().flatten(1).mean(1)  # the gradient of a root at 0 would be infinite
    rows = std.repeat_interleave(groups.shape[1]).reshape(-1, *[1] * (x.ndim - 1))
    return torch.cat((x, rows.expand(-1, 1, *x.shape[2:])), dim=1)


class Discriminator(nn.Module):
    """D(x, label), (n,), larger for data: images (c, side, side) of side 4, 8, 16, ..., or points (dim,).

    Images go through a 1x1 convolution of `channels` and residual `Block`s down to 4 pixels, each with twice the channels up to
    `max_channels`; points through two layers of `channels`. Then the minibatch standard deviation of groups of `group_size`, two
    more layers, and a dense head. Classes come in by projection (arXiv 1802.05637): <e(label), h> is added; NO_LABEL adds
    nothing. Every operation can be differentiated twice, as gradient penalties want.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int = 0, channels: int = 64, max_channels: int = 512, group_size: int = 4
    ) -> None:
        super().__init__()
        self.group_size = group_size
        widths = [channels] if len(shape) == 1 else image_widths(shape, channels, max_channels)
        width, kernel, size = (widths[-1], (), 1) if len(shape) == 1 else (widths[-1], (3, 3), LAST_SIDE**2)
        self.trunk = points_trunk(shape[0], channels) if len(shape) == 1 else images_trunk(shape[0], widths)
        self.joined = nn.Sequential(
            Scaled(width + 1, width, *kernel), Leaky(), nn.Flatten(), Scaled(size * width, width), Leaky()
        )
        self.value = Scaled(width, 1, bias=False)  # only differences of D count
        self.embedding = nn.Embedding(num_classes, width) if num_classes else None

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """D, (n,), of x (n, *shape); label (n,) of a conditional one."""
        h = self.joined(with_minibatch_std(self.trunk(x), self.group_size))
        value = self.value(h)[:, 0]
        if self.embedding is None:
            return value
        assert label is not None, "a conditional discriminator wants labels"
        projected = (self.embedding(label.clamp(min=0)) * h).sum(1) / math.sqrt(h.shape[1])
        return value + torch.where(label == NO_LABEL, 0.0, projected)


def points_trunk(dim: int, channels: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(Scaled(dim, channels), Leaky(), Scaled(channels, channels), Leaky())


def images_trunk(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """A 1x1 convolution, and a block from each width to the next."""
    return nn.Sequential(Scaled(channels, widths[0], 1, 1), Leaky(), *(Block(a, b) for a, b in pairwise(widths)))


def image_widths(shape: Sequence[int], channels: int, max_channels: int) -> list[int]:
    """The channels at every side from the image's to LAST_SIDE. Raises a `UserError` for images that do not halve down to it."""
    _, height, side = shape
    halvings = max(0, side // LAST_SIDE).bit_length() - 1
    fits = height == side == LAST_SIDE * 2 ** max(halvings, 0)
    require(fits, "flow_map/adversarial", list(shape), f"needs square images of side {LAST_SIDE} times a power of two, or points")
    return [min(channels * 2**i, max_channels) for i in range(halvings + 1)]
