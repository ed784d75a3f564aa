"""EDM2's magnitude-preserving U-Net (Karras et al., arXiv 2312.02696, configuration G).

Every operation keeps the expected magnitude of activations: no group norms, no biases, weights of unit magnitude.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, in_forward_ad, split_heads
from .embedding import Aim, Jump, c_noise, features_of_time, one_hot
from .skeleton import Skeleton, Stage, resample

HEAD_DIM = 64  #: channels a head
CLIP = 256.0  #: activations stay within it
EPS = 1e-4


def normalised(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x over its root mean square along `dim`; the latter in float32."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    num = math.prod([x.shape[d] for d in ((dim,) if isinstance(dim, int) else dim)])  # a list: a generator does not compile
    return x / (EPS + norm * math.sqrt(1 / num)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of unit magnitude for x ~ N(0, 1) (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The sum of independent a and b, with this share of b (equation 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """a and b side by side, each contributing as much whatever its number of channels (equation 103, t = 1/2)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([x * math.sqrt(total / (2 * x.shape[1])) for x in (a, b)], dim=1)


class MPFourier(nn.Module):
    """Random Fourier features (n, dim) of a noise label (n,), of unit magnitude (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(dim))

    def forward(self, label: Tensor) -> Tensor:
        """The features (n, dim), of the label's dtype."""
        return math.sqrt(2) * (label[:, None] * self.freqs.to(label.dtype) + self.phases.to(label.dtype)).cos()


class MPConv(nn.Module):
    """A convolution, or with no `kernel` a linear layer, whose weights have unit magnitude whatever is stored (equation 47)."""

    def __init__(self, channels_in: int, channels_out: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(n, channels_in, ...) to (n, channels_out, ...)."""
        weight = (self.unit() * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def unit(self) -> Tensor:
        """The weights, each output's with root mean square 1."""
        return normalised(self.weight, tuple(range(1, self.weight.ndim)))


class MPBlock(nn.Module):
    """A residual branch of two 3x3 convolutions that the embedding scales in between, then self-attention (figure 21).

    In the encoder the main path is brought to its width and normalised first; in the decoder it meets the branch at the end.
    """

    def __init__(self, stage: Stage, embedding_dim: int, encodes: bool, dropout: float) -> None:
        super().__init__()
        wide, out = stage.channels_in, stage.channels_out
        self.how, self.encodes = stage.resample, encodes
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out if encodes else wide, out, 3, 3)
        self.emb_linear = MPConv(embedding_dim, out)
        self.dropout = nn.Dropout(dropout)
        self.conv_res1 = MPConv(out, out, 3, 3)
        self.conv_skip = MPConv(wide, out, 1, 1) if wide != out else nn.Identity()
        self.num_heads = out // HEAD_DIM if stage.attends else 0
        if self.num_heads:
            self.attn_qkv = MPConv(out, 3 * out, 1, 1)
            self.attn_proj = MPConv(out, out, 1, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, channels_in, h, w), embedding (n, embedding_dim), to (n, channels_out, h', w')."""
        x = resample(x, self.how)
        if self.encodes:
            x = normalised(self.conv_skip(x), 1)
        scale = (self.emb_linear(embedding, self.emb_gain) + 1)[:, :, None, None]
        h = self.conv_res0(mp_silu(x))
        h = self.conv_res1(self.dropout(mp_silu(h * scale.to(h.dtype))))
        x = mp_sum(x if self.encodes else self.conv_skip(x), h, 0.3)
        if self.num_heads:
            x = mp_sum(x, self.attention(x), 0.3)
        return x.clamp(-CLIP, CLIP)

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; queries, keys and values are normalised."""
        heads = normalised(split_heads(self.attn_qkv(x), self.num_heads), 2)
        return self.attn_proj(attend(heads).reshape(x.shape))


class EDM2(nn.Module):
    """F(x, t, label): (n, c, h, w) to the same shape.

    `channels` sets the size: 128 is XS, 192 S, 256 M, 320 L, 384 XL, 448 XXL. Level i has `num_blocks` blocks of
    `channels * multipliers[i]` channels at `resolution / 2^i` pixels; heads of 64 channels attend, so a level narrower than
    that does not. In training mode every pass that records gradients normalises the stored weights first (equation 66).
    With `jumps` it is a flow map's.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        num_classes: int = 0,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.jumps, widths = num_classes, jumps, [channels * m for m in multipliers]
        skeleton, dim = Skeleton(resolution, widths[0], widths, num_blocks, attention_resolutions), max(widths)
        decoder = skeleton.decoder()
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], dim)
        self.emb_label = MPConv(num_classes, dim) if num_classes else None
        self.enc = nn.ModuleDict({f"{resolution}x{resolution}_conv": MPConv(in_channels + 1, widths[0], 3, 3)})
        self.enc.update({stage.name: MPBlock(stage, dim, True, dropout) for stage in skeleton.encoder()})
        self.dec = nn.ModuleDict({stage.name: MPBlock(stage, dim, False, dropout) for stage in decoder})
        self.joins = [stage.joins for stage in decoder]
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.out_conv = MPConv(widths[0], in_channels, 3, 3)
        self.jump = Jump(widths[0]) if jumps else None

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, aim: Aim | None = None) -> Tensor:
        """F(x, t, label): x (n, c, h, w), t (n,), label (n,) or None; aim for a flow map."""
        if self.training and torch.is_grad_enabled() and not in_forward_ad():
            self.force_unit_weights()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would blur the noise level
            embedding = self.embed(self.time_features(t, aim), label)
        stem, *blocks = self.enc.values()
        skips = [stem(torch.cat((x, torch.ones_like(x[:, :1])), dim=1))]  # a constant stands in for biases
        for block in blocks:
            skips.append(block(skips[-1], embedding))
        h = skips[-1]
        for joins, block in zip(self.joins, self.dec.values(), strict=True):
            h = block(mp_cat(h, skips.pop()) if joins else h, embedding)
        return self.out_conv(h, self.out_gain)

    def time_features(self, t: Tensor, aim: Aim | None = None) -> Tensor:
        """The features of time (n, channels)."""
        return features_of_time(lambda t: self.emb_fourier(c_noise(t)), self.jump, t, aim).to(self.emb_noise.weight.dtype)

    def first(self, features: Tensor) -> Tensor:
        """What the first layer after them makes of the features of time."""
        made: Tensor = self.emb_noise(features)
        return made

    def embed(self, features: Tensor, label: Tensor | None) -> Tensor:
        """The embedding (n, dim) of time, by its features, and label."""
        embedding = self.emb_noise(features)
        if self.emb_label is not None:
            labels = math.sqrt(self.num_classes) * one_hot(label, self.num_classes, embedding)
            embedding = mp_sum(embedding, self.emb_label(labels), 0.5)
        return mp_silu(embedding)

    @torch.compiler.disable  # in one graph with its backward pass, torch's inductor returns wrong gradients (2.15, CPU)
    @torch.no_grad()
    def force_unit_weights(self) -> None:
        """Forced weight normalisation: without it weights grow and the learning rate decays unseen (equation 66).

        A second pass before the backward one finds them normal already: `data` hides from autograd that it writes at all.
        """
        for module in self.modules():
            if isinstance(module, MPConv):
                module.weight.data.copy_(module.unit())
