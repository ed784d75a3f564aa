"""EDM's pickles as data: tensors and plain containers come out, and no code runs.

Such a pickle (torch_utils.persistence of EDM and EDM2) holds each module's source text beside its state, to be executed on
loading, and each tensor's storage as a pickle of its own. Here the text is left alone, the inner pickles are read by torch's
weights-only loader, and every other object becomes a `Record`, which holds what was given for it.
"""

import collections
import io
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


class _Frozen(type):
    """A class that no pickle can change."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{cls.__name__} is fixed")


class Record(metaclass=_Frozen):
    """An object of some class of theirs: the arguments it was to be made with, and its state; it does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Persistent(Record):
    """A persistent object: `state` holds its attributes; the source text that came with it is dropped."""

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        self.class_name, self.state = str(meta["class_name"]), meta["state"]


def _storage(content: bytes) -> Tensor:
    """A storage, itself pickled by torch, as a tensor (n,)."""
    with warnings.catch_warnings(action="ignore"):  # of what may be wrong with it: an error says it, in one line
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(found, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor's storage is none")
    return torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)  # untyped() warns of deprecation


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    if math.prod(size) > storage.numel():  # strides of 0 could make it any size
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    allowed: dict[str, Callable[..., Any]] = {  # noqa: RUF012 (never changed)
        "collections.OrderedDict": collections.OrderedDict,
        "dnnlib.util.EasyDict": dict,
        "numpy._core.multiarray._reconstruct": Record,
        "numpy._core.multiarray.scalar": Record,
        "numpy.core.multiarray._reconstruct": Record,
        "numpy.core.multiarray.scalar": Record,
        "numpy.dtype": Record,
        "numpy.ndarray": Record,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch.nn.modules.container.ModuleDict": Record,
        "torch.nn.modules.container.ModuleList": Record,
        "torch.storage._load_from_bytes": _storage,
        "torch_utils.persistence._reconstruct_persistent_obj": Persistent,
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, for which a network has no use")
        return self.allowed[f"{module}.{name}"]


def read(path: Path) -> Any:
    """What a pickle of EDM or EDM2 holds; raises `UserError`, one line, for a file that is anything else."""
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a pickle's bytes are a program: of a wrong one any error can come
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: not a whole pickle of EDM or EDM2 ({reason})") from None
