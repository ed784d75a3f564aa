"""Pickles in the layout of EDM's persistent classes, with embedded code that would create a file if it were run."""

import json
import pickle
import sys
import types
from pathlib import Path

import filled
import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parents[1] / "fixtures"
CODE = "import pathlib\npathlib.Path('EXECUTED').touch()\n"
CONTAINERS = ("enc", "dec")  #: the modules of theirs that are torch's own ModuleDict


def original(which):
    """What the originals computed at filled weights: settings and tensor shapes of each case, and their outputs by case/kind."""
    with safe_open(FIXTURES / f"{which}.safetensors", "pt") as file:
        outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["cases"]), outputs


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the code in a pickle was about to run")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Theirs:
    """An object of a persistent class."""

    def __init__(self, class_name, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": CODE, "class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


def dumps(value, protocol=4):
    """Pickle with `torch_utils.persistence` in place."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    try:
        return pickle.dumps(value, protocol)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def module(class_name, tensors, **attributes):
    """A persistent module of these tensors, by dotted names, whose children are modules too."""
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    buffers = {name: own.pop(name) for name in list(own) if name in ("resample_filter", "freqs", "phases")}
    parameters = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in own.items()}
    inside = {}
    for name, tensor in tensors.items():
        if "." in name:
            child, rest = name.split(".", 1)
            inside.setdefault(child, {})[rest] = tensor
    children = {name: container(below) if name in CONTAINERS else module("Child", below) for name, below in inside.items()}
    parts = {"_parameters": parameters, "_buffers": buffers, "_modules": children, "training": False}
    return Theirs(class_name, **parts, **attributes)


def container(tensors):
    """torch's ModuleDict, which keeps its state as it is."""
    made = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
    made.__dict__.update(module("", tensors).state)
    return made


KINDS = {"SongUNet": "EDMPrecond", "DhariwalUNet": "EDMPrecond", "UNet": "Precond"}


def network(case, dtype=torch.float32):
    """The network of a case of `original`, as a persistent object."""
    settings = dict(case["kwargs"])
    sigma_data, kind = settings.pop("sigma_data", 0.5), settings.pop("model_type", "UNet")
    settings.pop("use_fp16", None)
    tensors = {name: tensor_of(name, shape).to(dtype) for name, shape in case["state"].items()}
    prefix = "unet" if kind == "UNet" else "model"
    if kind != "UNet":
        channels = settings.pop("img_channels")
        settings |= {"in_channels": channels, "out_channels": channels}
    own = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    rest = {name: t for name, t in tensors.items() if not name.startswith(f"{prefix}.")}
    inner = module(kind, own, _init_args=(), _init_kwargs=settings)
    wrapper = module(KINDS[kind], rest, sigma_data=sigma_data, _init_args=(), _init_kwargs={})
    wrapper.state["_modules"][prefix] = inner
    return wrapper


def tensor_of(name, shape):
    """A filled weight, or the resampling filter, which is no weight: (1, 1) or (1, 3, 3, 1) in both directions over its sum."""
    if not name.endswith("resample_filter"):
        return filled.weight(name, shape)
    line = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[shape[-1]])
    return (torch.outer(line, line) / line.sum() ** 2)[None, None]
