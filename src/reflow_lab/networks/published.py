"""The classes of EDM's and EDM2's published networks, and which network of ours each is at which settings."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, require
from .pickles import Persistent, Record

WRAPPERS = {"EDMPrecond": "model", "Precond": "unet"}  #: classes that add EDM's preconditioning to a network, and where it is

NAMES = {  # of their settings -> of ours
    "in_channels": "in_channels",
    "img_channels": "in_channels",
    "img_resolution": "resolution",
    "label_dim": "num_classes",
    "augment_dim": "augment_dim",
    "model_channels": "channels",
    "channel_mult": "multipliers",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
}
LISTS = ("channel_mult", "attn_resolutions")
RENAMED = {  # tensors
    r"^enc\.(\d+x\d+)_aux_residual\.": r"pyramid.\1_down.",
    r"^dec\.\d+x\d+_aux_norm\.": "out_norm.",
    r"^dec\.\d+x\d+_aux_conv\.": "out_conv.",
}
FREE = ("out_channels", "label_dropout")  #: settings that do not change what is computed; the first is in_channels


@dataclass(frozen=True)
class Family:
    """A network of ours: their class at the settings `fixed`, which ours cannot vary; `free` are their defaults of the rest."""

    target: str
    class_name: str
    free: Mapping[str, Any]
    fixed: Mapping[str, Any]


SONG = {"label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4}
SONG |= {"attn_resolutions": [16], "dropout": 0.1}
ADM = {"label_dim": 0, "augment_dim": 0, "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
ADM |= {"attn_resolutions": [32, 16, 8], "dropout": 0.1}
EDM2 = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8], "dropout": 0}
SONG_ONLY = {"channel_mult_emb": 4, "decoder_type": "standard"}
DDPMPP_ONLY = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "resample_filter": [1, 1]}
NCSNPP_ONLY = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
EDM2_ONLY: dict[str, Any] = {"channel_mult_noise": None, "channel_mult_emb": None, "label_balance": 0.5, "concat_balance": 0.5}
EDM2_ONLY |= {"resample_filter": [1, 1], "channels_per_head": 64, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256}

FAMILIES = (
    Family("ddpmpp.DDPMpp", "SongUNet", SONG, {**SONG_ONLY, **DDPMPP_ONLY}),
    Family("ncsnpp.NCSNpp", "SongUNet", SONG, {**SONG_ONLY, **NCSNPP_ONLY}),
    Family("adm.ADM", "DhariwalUNet", ADM, {"channel_mult_emb": 4}),
    Family("edm2.EDM2", "UNet", EDM2, EDM2_ONLY),
)


def describe(wrapper: Persistent) -> dict[str, Any]:
    """The configuration of the same network here; raises `UserError` where ours cannot be like it."""
    theirs = inner(wrapper)
    given = {name: _plain(value) for name, value in theirs.state["_init_kwargs"].items() if name not in FREE}
    family = _family(theirs.class_name, given)
    settings = {name: value for name, value in {**family.free, **given}.items() if name in NAMES}
    for name, value in settings.items():
        require(_fits(name, value), f"{theirs.class_name}.{name}", str(value)[:40], "no network has such a setting")
    return {
        "_target_": "reflow_lab.networks.preconditioning.Preconditioned",
        "sigma_data": float(wrapper.state["sigma_data"]),
        "network": {"_target_": f"reflow_lab.networks.{family.target}", **_renamed(settings)},
    }


def inner(wrapper: Persistent) -> Persistent:
    """The network inside EDM's preconditioning."""
    name = wrapper.class_name
    require(name in WRAPPERS, "class", name, f"cannot be imported; allowed: {', '.join(WRAPPERS)}")
    return wrapper.state["_modules"][WRAPPERS[name]]


def _family(class_name: str, given: Mapping[str, Any]) -> Family:
    """The family whose fixed settings are the given ones; those that are not given are the class's own, its first family's."""
    families = [family for family in FAMILIES if family.class_name == class_name]
    allowed = ", ".join(dict.fromkeys(family.class_name for family in FAMILIES))
    require(bool(families), "class", class_name, f"cannot be imported; allowed: {allowed}")
    fixed = {**families[0].fixed, **{name: value for name, value in given.items() if name not in NAMES}}
    if found := [family for family in families if family.fixed == fixed]:
        return found[0]
    known = [family.fixed for family in families]
    strange = {n: v for n, v in fixed.items() if all(n not in k or k[n] != v for k in known)} or fixed
    raise UserError(f"{class_name} with {', '.join(f'{n}={v}' for n, v in strange.items())[:200]} is none of EDM's networks")


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {NAMES[name]: value for name, value in settings.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fits(name: str, value: Any) -> bool:
    if name in LISTS:
        return isinstance(value, list) and len(value) <= 16 and all(_fits("", item) for item in value)
    if name == "dropout":
        return isinstance(value, int | float) and 0 <= value < 1
    return type(value) is int and 0 <= value < 2**16


def state(wrapper: Persistent) -> dict[str, Tensor]:
    """The tensors of the network under our names.

    Left out are the resampling filters, which our networks have as a setting, and with the wrapper EDM2's estimate of its own
    loss, which is no part of the velocity.
    """
    network, found = inner(wrapper), {}
    taps = torch.tensor(network.state["_init_kwargs"].get("resample_filter", [1, 1]), dtype=torch.float32)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    for name, tensor in tensors(network):
        require(tensor.is_floating_point(), name, tensor.dtype, "a network's numbers are floating-point ones")
        if name.endswith("resample_filter"):
            require(torch.equal(tensor[0, 0].float(), kernel), name, tensor.tolist(), "is not the filter of its settings")
        else:
            found[own_name(name)] = tensor.clone(memory_format=torch.contiguous_format)
    return found


def tensors(record: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers under a module, by their dotted names."""
    for name, tensor in (*record.state["_parameters"].items(), *record.state["_buffers"].items()):
        if tensor is not None:
            yield f"{prefix}{name}", tensor
    for name, child in record.state["_modules"].items():
        if child is not None:
            yield from tensors(child, f"{prefix}{name}.")


def own_name(name: str) -> str:
    """Our name of a tensor of the inner network."""
    for theirs, ours in RENAMED.items():
        name = re.sub(theirs, ours, name)
    return f"network.{name}"
