"""How much memory sampling takes: the network's weights, and the most that its tensors hold at once."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of all tensors that operations return while it is on; `peak` is the largest sum, in bytes.

    Views share a storage, which counts once and until its last view dies. What an operation takes and frees inside itself is not
    seen. It costs some microseconds an operation.
    """

    def __init__(self, known: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.now, self.peak = known, 0, 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)):
            self._see(tensor)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held or key in self.known:
            return
        self.held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key)


def peak_memory_mb(make: Callable[[], Tensor], velocity: object, device: torch.device) -> tuple[Tensor, float]:
    """What `make` returns, and the memory in MB (10^6 bytes) that it took: `velocity`'s weights and the tensors' peak.

    On CUDA the peak is torch's own, workspaces of the libraries included; on the CPU it is that of `LiveTensors`, without what an
    operation uses inside itself (some 15 % of a convolutional network) and without the process's code.
    """
    storages = weights(velocity)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        made = make()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with (live := LiveTensors(storages)):
            made = make()
        peak = live.peak
    return made, (sum(storages.values()) + peak) / 1e6


def weights(velocity: object) -> dict[int, int]:
    """The storages of a network's parameters and buffers, with their bytes; a closed form has none."""
    tensors = [*velocity.parameters(), *velocity.buffers()] if isinstance(velocity, nn.Module) else []
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
