"""DDPM++ (Song et al., arXiv 2011.13456) as EDM configures it (arXiv 2206.00364, table 7)."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .edm import Block, EDMUNet, Style
from .embedding import FourierNoise, Jump, PositionalNoise, one_hot
from .skeleton import Skeleton


class DDPMpp(EDMUNet):
    """F(x, t, label, augment) of 55.7M parameters as it stands, EDM's for CIFAR-10.

    Level i has `num_blocks` blocks of `channels * multipliers[i]` channels at `resolution / 2^i` pixels; EDM takes the
    multipliers (2, 2, 2) at 32 pixels and (1, 2, 2, 2) at 64. `augment_dim` (EDM: 9, or 0 for none) is the length of the
    augmentation label, which is added where it is given. With `jumps` it is a flow map's.
    """

    taps: tuple[int, ...] = (1, 1)

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        jumps: bool = False,
    ) -> None:
        skeleton = Skeleton(resolution, channels, [channels * m for m in multipliers], num_blocks, attention_resolutions, True)
        style = Style(dropout, 1e-6, self.taps, projects=True, scale=math.sqrt(0.5))
        super().__init__(in_channels, skeleton, 4 * channels, style)
        self.num_classes, self.jumps = num_classes, jumps
        self.pyramid = self.input_pyramid(in_channels, skeleton)
        self.map_noise = self.noise_features(channels)
        dim = self.map_noise.dim
        self.map_label = nn.Linear(num_classes, dim) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, dim, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(dim, 4 * channels)
        self.map_layer1 = nn.Linear(4 * channels, 4 * channels)
        initialise(self)
        self.jump = Jump(dim) if jumps else None

    def noise_features(self, channels: int) -> PositionalNoise | FourierNoise:
        """What the noise label becomes first."""
        return PositionalNoise(channels, reaches_end=True, sines_first=True)

    def input_pyramid(self, in_channels: int, skeleton: Skeleton) -> nn.ModuleDict:
        """None: NCSN++ has one."""
        return nn.ModuleDict()

    def embed(self, features: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding (n, 4 channels)."""
        embedding = features
        if self.map_label is not None:
            embedding = embedding + self.map_label(math.sqrt(self.num_classes) * one_hot(label, self.num_classes, embedding))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))


def initialise(network: EDMUNet) -> None:
    """Uniform weights of fan-average 1 (Xavier) and no biases; what a residual branch adds starts at 1e-5 of that."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in (module for module in network.modules() if isinstance(module, Block)):
        nn.init.xavier_uniform_(block.conv1.weight, 1e-5)
        if block.num_heads:
            nn.init.xavier_uniform_(block.qkv.weight, math.sqrt(0.2))
            nn.init.xavier_uniform_(block.proj.weight, 1e-5)
    nn.init.xavier_uniform_(network.out_conv.weight, 1e-5)
