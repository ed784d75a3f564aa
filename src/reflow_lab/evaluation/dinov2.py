"""DINOv2's class token (Oquab et al., arXiv:2304.07193) through torch-fidelity, which resizes and normalises: FD_DINOv2.

torch-fidelity takes network and weights from torch's hub (facebookresearch/dinov2 of GitHub, Apache-2.0), whose code is run.
They are fetched at first use and kept in torch's hub folder. Nothing else here fetches code.
"""

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, require
from .features import as_saved, fp32_or_bf16

DIMENSIONS = {"s": 384, "b": 768, "l": 1024, "g": 1536}  #: of the features, by the size of the network


@functools.cache
def network(size: str, device: torch.device) -> nn.Module:
    """torch-fidelity's extractor, once a process and device; a `UserError` where it cannot be had."""
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    try:
        return FeatureExtractorDinoV2(f"dinov2-vit-{size}-14", ["dinov2"]).to(device)
    except Exception as error:  # a hub's errors are of every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        advice = f"needs a network once, or a copy of facebookresearch/dinov2 and its weights in {torch.hub.get_dir()}"
        raise UserError(f"evaluation/features=dinov2: {advice} ({reason})") from None


def content_hash(made: nn.Module) -> str:
    """SHA-256 of the names and values of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(made.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


class DINOv2Features:
    """Images to DINOv2's features; the network is loaded at the first call or when its hash is asked for.

    Images: uint8 or float in [-1, 1], (n, 1 or 3, h, w), rounded to bytes, grey repeated. IEEE float32.
    """

    def __init__(self, size: str = "l", batch_size: int = 32) -> None:
        require(size in DIMENSIONS, "evaluation.features.size", size, f"allowed: {', '.join(DIMENSIONS)}")
        fits = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
        require(fits, "evaluation.features.batch_size", batch_size, "a whole number of at least 1")
        self.size, self.batch_size, self.num_features = size, batch_size, DIMENSIONS[size]

    @property
    def name(self) -> str:
        """By the network's size, e.g. dinov2_vitl14."""
        return f"dinov2_vit{self.size}14"

    @property
    def weight_hash(self) -> str:
        """SHA-256 of the weights that the hub gave."""
        return content_hash(network(self.size, torch.device("cpu")))

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing else changes the features."""
        return {}

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 (n, d) on the CPU, computed where the images lie."""
        require(images.ndim == 4 and images.shape[1] in (1, 3), "images", tuple(images.shape), "shape (n, 1 or 3, h, w)")
        return torch.cat([self._batch(batch) for batch in torch.split(images, self.batch_size)])

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        with fp32_or_bf16(images.device, "fp32"):
            (features,) = network(self.size, images.device)(as_saved(images).expand(-1, 3, -1, -1))
        return features.float().cpu().clone()
