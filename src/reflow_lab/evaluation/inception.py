"""Inception-v3 as FID defines it: torch-fidelity's port of the TensorFlow graph of 2015-12-05, its resize included.

The network is torch-fidelity's `FeatureExtractorInceptionV3`, whose features are those of the original FID code (Heusel et al.,
arXiv:1706.08500) within float error. Here its batch norms are folded into the convolutions and its tensors lie channels last,
which is quicker and moves the features no more than rounding does (tests/evaluation/test_inception.py).
"""

import functools
import hashlib
import io
import urllib.error
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..artifacts import file_hash
from ..errors import UserError, bad_value, require
from .features import as_saved, fp32_or_bf16

KEY = "evaluation.features.weights"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
WEIGHT_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NUM_LOGITS = 1008
SIDE = 299  #: pixels that images are resized to


class Outputs(NamedTuple):
    """What Inception says of n images: pooled features, float32 (n, 2048), and logits without bias, float32 (n, 1008)."""

    features: Tensor
    logits: Tensor


class Inception(nn.Module):
    """torch-fidelity's extractor with its batch norms folded: pixels, float32 (n, 3, h, w) in 0..255, to `Outputs`."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        *layers, self.fc = folded(extractor).children()  # registered in the order in which they are applied
        self.trunk = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Outputs:
        """Resize as TensorFlow 1 did, scale to [-1, 1), and apply the network."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

        x = (resize(pixels, size=(SIDE, SIDE), align_corners=False) - 128) / 128
        features = self.trunk(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        return Outputs(features, features @ self.fc.weight.mT)


def folded(network: nn.Module) -> nn.Module:
    """The network with every batch norm, as it is in evaluation, folded in float64 into the convolution before it."""
    network.double()
    for block in network.modules():
        conv, norm = (getattr(block, name, None) for name in ("conv", "bn"))
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv, block.bn = nn.utils.fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network.float()


def weight_path(weights: str | Path | None = None) -> Path:
    """The file named, or the published one in torch's hub folder, downloaded if it is not there yet.

    Raises a `UserError` where the file is missing and cannot be had.
    """
    if weights is not None:
        require(Path(weights).is_file(), KEY, weights, f"no such file; {FILE} from {URL} is wanted")
        return Path(weights)
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        download(path)
    return path


def download(path: Path) -> None:
    """Fetch the published weights, checked by their hash; without a network, say which file goes where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=WEIGHT_HASH, progress=False)
    except urllib.error.HTTPError as error:
        raise bad_value(KEY, "null", f"{URL} answers {error.code}; {_by_hand(path)}") from None
    except OSError as error:
        raise bad_value(KEY, "null", f"{URL} cannot be reached ({_one_line(error)}); {_by_hand(path)}") from None
    except RuntimeError:
        raise bad_value(KEY, "null", f"{URL} gave a file whose sha256 is not {WEIGHT_HASH}; {_by_hand(path)}") from None


def _by_hand(path: Path) -> str:
    return f"put that file at {path}, or name it here"


def load(path: Path, wanted: str) -> Inception:
    """The network with the weights of a file, in evaluation mode.

    The file's bytes are read once, checked against the SHA-256 `wanted`, opened weights-only, and only then handed on to
    torch-fidelity, which would run what is pickled in them.
    """
    from torch_fidelity import FeatureExtractorInceptionV3

    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    require(found == wanted, KEY, path, f"sha256 must be {wanted}, is {found}")
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        layers: Any = ["2048", "logits_unbiased"]
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", layers, io.BytesIO(content))
    except Exception as error:  # a wrong file's bytes: of them any error can come
        raise UserError(f"{KEY}={path}: not Inception's weights as torch-fidelity has them ({_one_line(error)})") from None
    return Inception(extractor).eval().requires_grad_(False)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


_hash = functools.cache(lambda path, size, changed_ns: file_hash(path))


def content_hash(path: Path) -> str:
    """SHA-256 of a file, read again only when it has changed."""
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _network(path: Path, wanted: str, device: torch.device) -> Inception:
    return load(path, wanted).to(device).to(memory_format=torch.channels_last)


class InceptionFeatures:
    """Images to Inception's 2048 pooled features; the network is loaded at the first call, once a process and device.

    Images: uint8 or float in [-1, 1], (n, 1 or 3, h, w), on any device; grey is repeated to RGB. Floats are rounded to bytes as
    if saved, which is how published FIDs are made; `rounding=False` leaves them as they are.

    weights: a file of weights as torch-fidelity has them; None takes the published ones, from torch's hub folder or from the
    network, and refuses any other. A file of other weights makes other features, which bear its hash in their name: a distance
    of theirs is not FID. The network computes in IEEE float32.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None = None, rounding: bool = True, batch_size: int = 32):
        fits = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
        require(fits, "evaluation.features.batch_size", batch_size, "a whole number of at least 1")
        require(isinstance(rounding, bool), "evaluation.features.rounding", rounding, "true or false")
        self.weights, self.rounding, self.batch_size = weights, rounding, batch_size

    @property
    def weight_hash(self) -> str:
        """SHA-256 of the weight file, which is fetched if need be."""
        path = weight_path(self.weights)
        found = content_hash(path)
        require(self.weights is not None or found == WEIGHT_HASH, KEY, path, f"sha256 must be {WEIGHT_HASH}, is {found}")
        return found

    @property
    def name(self) -> str:
        """`inception` for the published weights, otherwise `inception_` and the first digits of the file's hash."""
        found = self.weight_hash
        return "inception" if found == WEIGHT_HASH else f"inception_{found[:8]}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on beside the weights."""
        return {"rounding": self.rounding}

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 (n, 2048) on the CPU, computed where the images lie."""
        return self.outputs(images).features

    def outputs(self, images: Tensor) -> Outputs:
        """Features and logits of one pass, on the CPU; the Inception Score is made of the logits."""
        require(images.ndim == 4 and images.shape[1] in (1, 3), "images", tuple(images.shape), "shape (n, 1 or 3, h, w)")
        batches = [self._batch(batch) for batch in torch.split(images, self.batch_size)]
        return Outputs(*map(torch.cat, zip(*batches, strict=True)))

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> tuple[Tensor, ...]:
        network = _network(weight_path(self.weights), self.weight_hash, images.device)
        with fp32_or_bf16(images.device, "fp32"):
            found = network(self.pixels(images).expand(-1, 3, -1, -1))
        return tuple(tensor.cpu().clone() for tensor in found)

    def pixels(self, images: Tensor) -> Tensor:
        """What the network is given, float32 in 0..255."""
        saved = as_saved(images)  # which refuses what is not finite
        return saved.float() if self.rounding or images.dtype == torch.uint8 else images.float() * 127.5 + 127.5
