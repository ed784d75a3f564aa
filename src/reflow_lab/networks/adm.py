"""ADM (Dhariwal and Nichol, arXiv 2105.05233) as EDM configures it for ImageNet-64 (arXiv 2206.00364, table 7)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .edm import Block, EDMUNet, Style
from .embedding import Jump, PositionalNoise, one_hot
from .skeleton import Skeleton


class ADM(EDMUNet):
    """F(x, t, label, augment) of 296M parameters as it stands, with 1000 classes.

    Level i has `num_blocks` blocks of `channels * multipliers[i]` channels at `resolution / 2^i` pixels; heads of 64 channels
    attend, so a level narrower than that does not. With `jumps` it is a flow map's.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        jumps: bool = False,
    ) -> None:
        widths = [channels * m for m in multipliers]
        skeleton = Skeleton(resolution, widths[0], widths, num_blocks, attention_resolutions)
        super().__init__(in_channels, skeleton, 4 * channels, Style(dropout, 1e-5, modulates=True, head_dim=64))
        self.num_classes, self.jumps = num_classes, jumps
        self.map_noise = PositionalNoise(channels, reaches_end=False, sines_first=False)
        self.map_augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(channels, 4 * channels)
        self.map_layer1 = nn.Linear(4 * channels, 4 * channels)
        self.map_label = nn.Linear(num_classes, 4 * channels, bias=False) if num_classes else None
        initialise(self)
        self.jump = Jump(channels) if jumps else None

    def embed(self, features: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding (n, 4 channels)."""
        embedding = features
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(one_hot(label, self.num_classes, embedding))
        return F.silu(embedding)


def initialise(network: ADM) -> None:
    """Torch's own initialisation, which is ADM's, but labels N(0, 1) and zero for what ends a residual branch."""
    ends: list[nn.Module | None] = [network.out_conv, network.map_augment]
    for block in (module for module in network.modules() if isinstance(module, Block)):
        ends += [block.conv1, block.proj] if block.num_heads else [block.conv1]
    for parameter in (p for end in ends if end is not None for p in end.parameters()):
        nn.init.zeros_(parameter)
    if network.map_label is not None:
        nn.init.normal_(network.map_label.weight)
