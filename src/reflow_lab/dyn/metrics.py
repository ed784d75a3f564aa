"""Improvement 3: the distance between the data x0 and its estimate D.

A metric takes D and x0, (n, ...), and t, (n,), to a loss per sample, (n,). It preserves the theory when it is
|| phi(x0) - phi(D) ||^2 with phi linear and invertible: then the minimiser is E[x0 | x_t], whatever the weight and the
times are (Simple ReFlow, GFM loss).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import bad_value, require
from ..flow import append_dims


class Metric(Protocol):
    """A loss per sample; `theory_preserving` if its minimiser is E[x0 | x_t]."""

    theory_preserving: ClassVar[bool]

    def __call__(self, D: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss, (n,), of the estimates D, (n, ...), of x0 at the times t, (n,)."""
        ...


def require_images(x: Tensor, metric: str) -> None:
    """Raise `UserError` unless x is a batch of images, (n, c, h, w)."""
    shape = tuple(x.shape[1:])
    require(x.ndim == 4, "dyn.metric", metric, f"needs images, not data of shape {shape}: use dyn/metric=squared_error")


@dataclass(frozen=True)
class SquaredError:
    """The mean over dimensions of (x0 - D)^2: phi is the identity (the flow matching loss)."""

    theory_preserving: ClassVar[bool] = True

    def __call__(self, D: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss, (n,)."""
        return (x0 - D).square().flatten(1).mean(1)


def huber(residual: Tensor, c_per_dim: float) -> Tensor:
    """(sqrt(||r||^2 + c^2) - c) / d with c = c_per_dim d, d the number of dimensions; r (n, ...) to (n,) (RF++).

    The norm is that of the whole sample, the division by d makes the loss one per dimension, as it is for the others.
    """
    squared = residual.square().flatten(1)
    c = c_per_dim * squared.shape[1]
    total = squared.sum(1)
    return total / ((total + c**2).sqrt() + c) / squared.shape[1]  # this form does not cancel for small residuals


@dataclass(frozen=True)
class PseudoHuber:
    """`huber` of x0 - D; its minimiser leans to the posterior's median (RF++, c = 0.00054 d)."""

    theory_preserving: ClassVar[bool] = False
    c_per_dim: float = 0.00054

    def __post_init__(self) -> None:
        require(self.c_per_dim > 0, "dyn.metric.c_per_dim", self.c_per_dim, "a number > 0")

    def __call__(self, D: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss, (n,)."""
        return huber(x0 - D, self.c_per_dim)


def low_frequencies(height: int, width: int, cutoff: float) -> Tensor:
    """The frequencies nearer to zero than cutoff times the half-diagonal: bool (height, width), in the order of the FFT.

    The set is symmetric about zero, so that filtering by it keeps a real image real. At cutoff 0.1 it has 21 of 1024
    members at 32 x 32 and 69 of 4096 at 64 x 64.
    """
    vertical = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
    horizontal = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)
    return torch.hypot(vertical, horizontal) < cutoff * math.hypot(height, width) / 2


@dataclass(frozen=True)
class HighPass:
    """|| phi(x0 - D) ||^2 with phi = I / (1 + lam_hpf) + HPF lam_hpf / (1 + lam_hpf), mean over dimensions (Simple ReFlow).

    Acts on each channel of images (n, c, h, w). High frequencies have gain 1, `low_frequencies` 1 / (1 + lam_hpf);
    lam_hpf = 0 is `SquaredError`. Raises `UserError` for other data.
    """

    theory_preserving: ClassVar[bool] = True
    lam_hpf: float = 1.0
    cutoff: float = 0.1

    def __post_init__(self) -> None:
        require(self.lam_hpf >= 0, "dyn.metric.lam_hpf", self.lam_hpf, "a number >= 0")
        require(0 <= self.cutoff <= 1, "dyn.metric.cutoff", self.cutoff, "a number in [0, 1], a share of the half-diagonal")

    def __call__(self, D: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss, (n,), by Parseval's theorem: no inverse FFT."""
        require_images(x0, "high_pass")
        spectrum = torch.view_as_real(torch.fft.rfft2(x0 - D, norm="ortho"))
        power = spectrum.square().sum(-1)
        return (_power_gains(self, *x0.shape[-2:], x0.dtype, x0.device) * power).flatten(1).sum(1) / x0[0].numel()

    def gains(self, height: int, width: int) -> Tensor:
        """The gain of phi at each frequency: float64 (height, width), in the order of the FFT."""
        low, one = 1 / (1 + self.lam_hpf), torch.ones((), dtype=torch.float64)
        return torch.where(low_frequencies(height, width, self.cutoff), low * one, one)

    def phi(self, x: Tensor) -> Tensor:
        """The linear map itself, (n, c, h, w) to the same: the loss is the mean of phi(x0 - D)^2."""
        height, width = x.shape[-2:]
        gains = self.gains(height, width)[:, : width // 2 + 1].to(x)
        return torch.fft.irfft2(gains * torch.fft.rfft2(x), s=(height, width))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # made in a validation step it must still serve a training step
def _power_gains(metric: HighPass, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of each bin of rfft2 in the loss: gain^2, twice where the bin stands for its mirror image too."""
    half = width // 2 + 1
    mirrored = (torch.arange(half) > 0) & (torch.arange(half) * 2 < width)
    return (metric.gains(height, width)[:, :half].square() * (1 + mirrored.double())).to(device, dtype)


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _lpips_network(net: str, device: torch.device) -> nn.Module:
    """The frozen perceptual network, from the weights that its package ships; quiet and without a download."""
    try:
        from stlpips_pytorch import stlpips
    except ImportError as error:
        missing = f"needs the package {error.name}: pip install 'reflow_lab[lpips]'"
        raise bad_value("dyn.metric", "lpips_huber", missing) from error
    network = stlpips.LPIPS(net=net, variant="shift_tolerant", pretrained=False, verbose=False)
    path = Path(stlpips.__file__).parent / "weights" / "vST0.0" / f"{net}_shift_tolerant.pth"
    found = network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    assert all(key.startswith("lins.") for key in found.missing_keys)  # second names of lin0 ... lin4, which are there
    return network.eval().requires_grad_(False).to(device)


def lpips(image: Tensor, reference: Tensor, net: str) -> Tensor:
    """Shift-tolerant LPIPS of images (n, 1 or 3, h, w) in [-1, 1], enlarged to at least 64 pixels a side: (n,)."""
    scale = 64 / min(image.shape[-2:])
    pair = torch.cat((image, reference)).expand(-1, 3, -1, -1)
    if scale > 1:
        pair = nn.functional.interpolate(pair, scale_factor=scale, mode="bilinear", align_corners=False)
    return _lpips_network(net, image.device)(*pair.chunk(2)).flatten()


@dataclass(frozen=True)
class LPIPSHuber:
    """(1 - t) huber(v - (x1 - x0)) + LPIPS(D, x0), where v - (x1 - x0) = (x0 - D) / t (RF++); needs images and t > 0.

    `net` is the trunk, vgg (as in RF++) or alex (several times quicker). LPIPS is the shift-tolerant one of the extra
    `lpips`, loaded on the first call; without it that call raises `UserError`.
    """

    theory_preserving: ClassVar[bool] = False
    net: str = "vgg"
    c_per_dim: float = 0.00054

    def __post_init__(self) -> None:
        require(self.net in ("vgg", "alex"), "dyn.metric.net", self.net, "vgg or alex")
        require(self.c_per_dim > 0, "dyn.metric.c_per_dim", self.c_per_dim, "a number > 0")

    def __call__(self, D: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss, (n,)."""
        require_images(x0, "lpips_huber")
        require(x0.shape[1] in (1, 3), "dyn.metric", "lpips_huber", f"needs 1 or 3 channels, the data have {x0.shape[1]}")
        return (1 - t) * huber((x0 - D) / append_dims(t, x0), self.c_per_dim) + lpips(D, x0, self.net)
