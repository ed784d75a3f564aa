"""The lab's networks, tiny, as flow maps with every path alive: shared by the tests of flow maps."""

import zlib
from functools import partial

import torch

from reflow_lab.networks.adm import ADM
from reflow_lab.networks.ddpmpp import DDPMpp
from reflow_lab.networks.edm2 import EDM2
from reflow_lab.networks.mlp import MLP
from reflow_lab.networks.ncsnpp import NCSNpp
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.networks.unet import UNet

SONG = {"channels": 16, "multipliers": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}
WIDE = {"channels": 64, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": (8,)}  # a head has 64 channels
NETWORKS = {
    "mlp": partial(MLP, 2, 3, width=32),
    "unet": partial(UNet, 3, 8, 3, channels=16, multipliers=(1, 2), dropout=0.0),
    "ddpmpp": partial(DDPMpp, 3, 8, 3, **SONG, dropout=0.0),
    "ncsnpp": partial(NCSNpp, 3, 8, 3, **SONG, dropout=0.0),
    "adm": partial(ADM, 3, 8, 3, **WIDE, dropout=0.0),
    "edm2": partial(EDM2, 3, 8, 3, **WIDE),
}
ALIGNED = [name for name in NETWORKS if name not in ("mlp", "unet")]  #: whose time embedding is replaced


def made(name: str, jumps: bool = True, **changed: object) -> Preconditioned:
    """A network whose weights are drawn by their names, of a size that keeps activations near 1."""
    network = Preconditioned(NETWORKS[name](jumps=jumps, **changed))
    network.load_state_dict({key: weight(key, value) for key, value in network.state_dict().items()})
    return network


def weight(name: str, like: torch.Tensor) -> torch.Tensor:
    """A weight drawn by its name."""
    z = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("freqs"):
        return 6 * z
    if z.ndim >= 2:
        return z / z[0].numel() ** 0.5
    is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gain")
    return (1.0 if is_scale else 0.0) + 0.2 * z


def batch(name: str, num: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x_t, a direction v, t, s <= t that float32 holds exactly, labels and lam_guid."""
    g = torch.Generator().manual_seed(1)
    x, v = (torch.randn(num, *((2,) if name == "mlp" else (3, 8, 8)), generator=g).to(dtype) for _ in range(2))
    t = torch.tensor([0.125, 0.5, 0.75, 0.96875, 0.25, 0.375])[:num].to(dtype)
    s = torch.tensor([0.0625, 0.125, 0.71875, 0.5, 0.0625, 0.25])[:num].to(dtype)
    return x, v, t, s, torch.arange(num) % 3, torch.linspace(1, 3, num).to(dtype)
