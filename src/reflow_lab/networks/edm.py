"""What the networks of EDM (arXiv 2206.00364) share: the residual block and the U-Net around it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from .attention import attend, in_forward_ad, split_heads
from .embedding import Aim, Jump, c_noise, features_of_time
from .skeleton import Skeleton, Stage, resample


@dataclass(frozen=True)
class Style:
    """What a block of DDPM++, NCSN++ or ADM is like (EDM, table 7)."""

    dropout: float
    eps: float  #: of the group norms
    taps: tuple[int, ...] = (1, 1)  #: of the resampling filter
    modulates: bool = False  #: the embedding scales and shifts after the second norm (ADM); otherwise it is added before it
    projects: bool = False  #: a skip that changes its resolution has a 1x1 convolution
    scale: float = 1.0  #: of a sum of two branches
    head_dim: int | None = None  #: channels a head; None: one head


class GroupNorm(nn.GroupNorm):
    """torch's, in a form that a compiled Jacobian-vector product accepts: there the weights come after the norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        if not in_forward_ad():
            return super().forward(input)
        h = F.group_norm(input, self.num_groups, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], h, self.weight[:, None, None])


def group_norm(channels: int, eps: float) -> GroupNorm:
    """Group normalisation with 32 groups, or fewer of at least 4 channels each."""
    groups = max(1, min(32, channels // 4))
    require(channels % groups == 0, "channels", channels, f"must divide into {groups} groups; take a multiple of 32")
    return GroupNorm(groups, channels, eps)


class Block(nn.Module):
    """Two normalised 3x3 convolutions beside a skip, then self-attention where the stage asks for it."""

    def __init__(self, stage: Stage, embedding_dim: int, style: Style) -> None:
        super().__init__()
        wide, out = stage.channels_in, stage.channels_out
        self.how, self.style = stage.resample, style
        self.norm0 = group_norm(wide, style.eps)
        self.conv0 = nn.Conv2d(wide, out, 3, padding=1)
        self.affine = nn.Linear(embedding_dim, 2 * out if style.modulates else out)
        self.norm1 = group_norm(out, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1)
        projects = wide != out or (style.projects and self.how != "keep")
        self.skip = nn.Conv2d(wide, out, 1) if projects else nn.Identity()
        self.num_heads = (out // style.head_dim if style.head_dim else 1) if stage.attends else 0
        if self.num_heads:
            self.norm2 = group_norm(out, style.eps)
            self.qkv = nn.Conv2d(out, 3 * out, 1)
            self.proj = nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, channels_in, h, w), embedding (n, embedding_dim), to (n, channels_out, h', w')."""
        h = self.conv0(self.resampled(F.silu(self.norm0(x))))
        h = F.silu(self.conditioned(h, self.affine(embedding)[:, :, None, None]))
        x = (self.skip(self.resampled(x)) + self.conv1(self.dropout(h))) * self.style.scale
        return (x + self.attention(x)) * self.style.scale if self.num_heads else x

    def resampled(self, x: Tensor) -> Tensor:
        """At the resolution of the output."""
        return resample(x, self.how, self.style.taps)

    def conditioned(self, h: Tensor, affine: Tensor) -> Tensor:
        """The second norm, with the embedding before or after it."""
        if not self.style.modulates:
            return self.norm1(h + affine)
        scale, shift = affine.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)

    def attention(self, x: Tensor) -> Tensor:
        """The residual of self-attention over pixels."""
        return self.proj(attend(split_heads(self.qkv(self.norm2(x)), self.num_heads)).reshape(x.shape))


class EDMUNet(nn.Module):
    """F(x, t, label, augment): (n, c, h, w) to the same shape; a subclass says how time and labels are embedded."""

    map_noise: nn.Module
    map_layer0: nn.Linear  #: the first layer after the features of time
    jump: Jump | None  #: of a flow map

    def __init__(self, in_channels: int, skeleton: Skeleton, embedding_dim: int, style: Style) -> None:
        super().__init__()
        decoder = skeleton.decoder()
        side, width = f"{skeleton.resolution}x{skeleton.resolution}", skeleton.widths[0]
        self.enc = nn.ModuleDict({f"{side}_conv": nn.Conv2d(in_channels, skeleton.stem, 3, padding=1)})
        self.enc.update({stage.name: Block(stage, embedding_dim, style) for stage in skeleton.encoder()})
        self.dec = nn.ModuleDict({stage.name: Block(stage, embedding_dim, style) for stage in decoder})
        self.joins = [stage.joins for stage in decoder]
        self.out_norm = group_norm(width, style.eps)
        self.out_conv = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None, aim: Aim | None = None
    ) -> Tensor:
        """F(x, t, label): x (n, c, h, w), t (n,), label (n,) or None, augment (n, augment_dim) or None; aim for a flow map."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would blur the noise level
            embedding = self.embed(self.time_features(t, aim), label, augment)
        skips = self.encode(x, embedding)
        h = skips[-1]
        for joins, block in zip(self.joins, self.dec.values(), strict=True):
            h = block(torch.cat((h, skips.pop()), dim=1) if joins else h, embedding)
        return self.out_conv(F.silu(self.out_norm(h)))

    def time_features(self, t: Tensor, aim: Aim | None = None) -> Tensor:
        """The features of time (n, dim)."""
        return features_of_time(lambda t: self.map_noise(c_noise(t)), self.jump, t, aim).to(self.map_layer0.weight.dtype)

    def first(self, features: Tensor) -> Tensor:
        """What the first layer after them makes of the features of time."""
        made: Tensor = self.map_layer0(features)
        return made

    def embed(self, features: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding (n, embedding_dim) of time, by its features, and labels."""
        raise NotImplementedError

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The skips, first to last."""
        stem, *blocks = self.enc.values()
        skips = [stem(x)]
        for block in blocks:
            skips.append(block(skips[-1], embedding))
        return skips
