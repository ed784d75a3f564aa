"""NCSN++ (Song et al., arXiv 2011.13456) as EDM configures it (arXiv 2206.00364, table 7)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .ddpmpp import DDPMpp
from .embedding import FourierNoise
from .skeleton import Skeleton, blur


class NCSNpp(DDPMpp):
    """DDPM++ with random Fourier features of the noise level, a wider resampling filter, and a residual pyramid of the input.

    The settings are DDPM++'s; 56.4M parameters as it stands.
    """

    taps = (1, 3, 3, 1)

    def noise_features(self, channels: int) -> FourierNoise:
        """Twice as many as in DDPM++."""
        return FourierNoise(2 * channels)

    def input_pyramid(self, in_channels: int, skeleton: Skeleton) -> nn.ModuleDict:
        """For each halving, what brings the level above, first of all the image, to its size and width."""
        downs = [stage for stage in skeleton.encoder() if stage.resample == "down"]
        widths = [in_channels, *(stage.channels_out for stage in downs)]
        return nn.ModuleDict({s.name: Reduction(w, s.channels_out) for s, w in zip(downs, widths, strict=False)})

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The skips; after each halving the pyramid's next level joins the main path."""
        stem, above = next(iter(self.enc.values())), x
        skips = [stem(x)]
        for name, block in list(self.enc.items())[1:]:
            h = block(skips[-1], embedding)
            if name in self.pyramid:
                h = above = (h + self.pyramid[name](above)) * math.sqrt(0.5)
            skips.append(h)
        return skips


class Reduction(nn.Conv2d):
    """A 3x3 convolution, then the filter (1, 3, 3, 1) at every second pixel."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=2)  # two: one of them is the filter's

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) to (n, channels_out, h / 2, w / 2)."""
        h = super().forward(x)
        return F.conv2d(h, blur(h, NCSNpp.taps), stride=2, groups=h.shape[1])
