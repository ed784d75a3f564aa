"""Images to latents and back by a pretrained autoencoder (Rombach et al. 2022, arXiv:2112.10752), through `diffusers`.

The conventions are those of EDM2 (Karras et al. 2024, arXiv:2312.02696), whose networks for ImageNet-512 then fit: pixels go in
and come out as numbers in [0, 1], not [-1, 1]; the encoder's mean and standard deviation are kept and a latent is drawn from
them; each channel is shifted and scaled by fixed numbers to mean 0 and standard deviation 0.5, EDM's sigma_data.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, require
from .sources import reading

STABLE_DIFFUSION = "stabilityai/sd-vae-ft-mse"  #: its autoencoder, on the Hugging Face hub
MEAN = (5.81, 3.25, 0.12, -2.15)  #: of its latents of ImageNet-512, by channel (EDM2)
STD = (4.17, 4.62, 3.71, 3.28)
SIGMA_DATA = 0.5
BATCH = 8  #: images that are encoded or decoded at a time: at 512 pixels each takes about a GB
HUB = re.compile(r"[\w.-]+/[\w.-]+")
KIND = "a folder that AutoencoderKL.save_pretrained wrote, or the name of one on the Hugging Face hub"


@functools.lru_cache(maxsize=2)
def load(path: str, key: str = "data.autoencoder") -> nn.Module:
    """The autoencoder of a folder or of the hub, which downloads it; float32, on the CPU.

    Raises a `UserError`, one line with `key`, where there is none or `diffusers` is missing; pickled weights are not read.
    """
    try:
        from diffusers import AutoencoderKL as Model
    except ImportError:
        raise UserError(f"{key}={path}: latents need diffusers: pip install 'reflow_lab[latents]'") from None
    kind: Any = Model  # diffusers' functions have no types
    folder = Path(path).expanduser()
    require(folder.is_dir() or bool(HUB.fullmatch(path)), key, path, f"no such folder; must be {KIND}")
    with reading(f"{key}={path}", f"autoencoder: it must be {KIND}"):
        where = str(folder) if folder.is_dir() else path
        model: nn.Module = kind.from_pretrained(where, use_safetensors=True, low_cpu_mem_usage=False)
    return model.eval().requires_grad_(False)


def weights_hash(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the names and values of all tensors, wherever they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def factor(model: Any) -> int:
    """Pixels along a side of the square that one latent stands for: every level but the last halves it."""
    return 2 ** (len(model.config.block_out_channels) - 1)


@torch.no_grad()
def moments(model: Any, images: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) to the mean and standard deviation of their latents, float32 (n, 2c, h / factor, w / factor)."""
    found = model.encode(images.float() / 255).latent_dist
    return torch.cat((found.mean, found.std), dim=1)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers, one a channel, to be broadcast over samples (n, c, h, w)."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


@dataclass(frozen=True)
class Codec:
    """How latents were made, and so how samples become images again; `asdict` of it stands in weight files.

    mean, std: of the raw latents, by channel. weights: the autoencoder's `weights_hash`, null where it is not known.
    """

    autoencoder: str = STABLE_DIFFUSION
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    weights: str | None = None

    @classmethod
    def described(cls, about: dict[str, Any], autoencoder: str | None = None) -> "Codec":
        """From a weight file's description; `autoencoder` stands in for the path there, which may be another machine's."""
        mean, std = tuple(about["mean"]), tuple(about["std"])
        return cls(autoencoder or about["autoencoder"], mean, std, about["weights"])

    @property
    def about(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def suits(self, other: "Codec") -> bool:
        """Whether latents of both are the same as far as it is known, wherever their autoencoder lies."""
        known = self.weights is not None and other.weights is not None
        return (self.mean, self.std) == (other.mean, other.std) and (not known or self.weights == other.weights)

    def standardised(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std * sigma_data, which networks see; (n, c, h, w)."""
        return (raw - per_channel(self.mean, raw)) / per_channel(self.std, raw) * SIGMA_DATA

    def raw(self, latents: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return latents.float() / SIGMA_DATA * per_channel(self.std, latents) + per_channel(self.mean, latents)

    def model(self, key: str = "data.autoencoder") -> Any:
        """The autoencoder; a `UserError` where it is not the one that the latents were made with."""
        found = load(self.autoencoder, key)
        other = f"has other weights ({_hash(found)}) than the autoencoder that made the latents ({self.weights})"
        require(self.weights in (None, _hash(found)), key, self.autoencoder, other)
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Samples of a latent flow, (n, c, h, w), to images, float32 (n, 3, factor h, factor w) in [-1, 1], on their device."""
        model = self.model().to(latents.device)
        images = [model.decode(batch).sample for batch in torch.split(self.raw(latents), BATCH)]
        return torch.cat(images).clamp_(0, 1).mul_(2).sub_(1)


@functools.lru_cache(maxsize=2)
def _hash(model: nn.Module) -> str:
    return weights_hash(model)
