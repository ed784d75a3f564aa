"""The skeleton of EDM's and EDM2's U-Nets: which stages there are, under which names, between which widths."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import require

Resampling = Literal["keep", "down", "up"]


@dataclass(frozen=True)
class Stage:
    """One block of a U-Net. Its name, e.g. `16x16_block0`, is the one it has in the published files."""

    name: str
    channels_in: int  #: with the skip that joins it
    channels_out: int
    resample: Resampling = "keep"
    attends: bool = False
    joins: bool = False  #: a skip is concatenated to its input


@dataclass(frozen=True)
class Skeleton:
    """`num_blocks` blocks a level of `widths[i]` channels at `resolution / 2^i` pixels; one more on the way up.

    Each output of the encoder, the stem's of `stem` channels included, is a skip to its mirror image. Blocks attend at the
    resolutions of `attention`, and so does the first one of the decoder.
    """

    resolution: int
    stem: int
    widths: Sequence[int]
    num_blocks: int
    attention: Collection[int]
    attends_once: bool = False  #: on the way up only a level's last block attends (DDPM++, NCSN++)

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.widths) - 1)
        require(self.resolution % factor == 0, "resolution", self.resolution, f"must be a multiple of {factor} for this network")

    def encoder(self) -> list[Stage]:
        """The stages after the stem, in order."""
        stages, width = [], self.stem
        for level, channels in enumerate(self.widths):
            side = self.resolution >> level
            if level:
                stages.append(Stage(f"{side}x{side}_down", width, width, "down"))
            for i in range(self.num_blocks):
                stages.append(Stage(f"{side}x{side}_block{i}", width, channels, attends=side in self.attention))
                width = channels
        return stages

    def decoder(self) -> list[Stage]:
        """The stages before the head, in order."""
        skips, width = [self.stem, *(stage.channels_out for stage in self.encoder())], self.widths[-1]
        side = self.resolution >> (len(self.widths) - 1)
        stages = [Stage(f"{side}x{side}_in0", width, width, attends=True), Stage(f"{side}x{side}_in1", width, width)]
        for level in reversed(range(len(self.widths))):
            side, channels = self.resolution >> level, self.widths[level]
            if level < len(self.widths) - 1:
                stages.append(Stage(f"{side}x{side}_up", width, width, "up"))
            for i in range(self.num_blocks + 1):
                attends = side in self.attention and (i == self.num_blocks or not self.attends_once)
                stages.append(Stage(f"{side}x{side}_block{i}", width + skips.pop(), channels, attends=attends, joins=True))
                width = channels
        return stages


def resample(x: Tensor, how: Resampling, taps: Sequence[int] = (1, 1)) -> Tensor:
    """Halve or double the sides of x (n, c, h, w) with the separable filter `taps`, an even number of them; or keep them."""
    if how == "keep":
        return x
    if tuple(taps) == (1, 1):  # the same as below, quicker
        return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0)
    kernel, padding = blur(x, taps), len(taps) // 2 - 1
    if how == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


def blur(x: Tensor, taps: Sequence[int]) -> Tensor:
    """The filter taps^T taps, of sum 1, for every channel of x: (c, 1, k, k)."""
    line = x.new_tensor(taps) / sum(taps)
    return (line[:, None] * line).expand(x.shape[1], 1, -1, -1)
