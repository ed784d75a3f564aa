"""Processes that work together: which of several this one is, and what those that train one run say to each other.

torchrun, srun or our own launcher (`training.processes`) starts them. They are told apart by environment variables; only those
that train a run together (`together`) are also connected.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError

if TYPE_CHECKING:  # what only asks for the rank starts light
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=7)  #: for the first process, which may wait for the artifact's lock or draw samples alone
_team = 1  # how many processes are connected now


def _number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def rank() -> int:
    """The number of this process, from 0: RANK of torchrun, SLURM_PROCID of srun."""
    return _number("RANK", "SLURM_PROCID", default=0)


def world_size() -> int:
    """How many processes were started together: WORLD_SIZE of torchrun, SLURM_STEP_NUM_TASKS of srun (none without it)."""
    return max(1, _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1))


def take_own_gpu() -> None:
    """Make this process's own GPU, by its number on this machine, the one that `cuda` means."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", "SLURM_LOCALID", default=0) % torch.cuda.device_count())


@contextlib.contextmanager
def together(num: int) -> Iterator[None]:
    """Be one of `num` connected processes, each of which calls this; with one, nothing happens."""
    global _team
    if num > 1:
        _connect(num)
    _team = num
    try:
        yield
    finally:
        _team = 1


def _connect(num: int) -> None:
    import torch
    import torch.distributed as dist

    take_own_gpu()
    if dist.is_initialized():
        return
    cluster = environment(num)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank(), world_size=num, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)


def environment(num: int) -> "ClusterEnvironment":
    """What tells Lightning about `num` processes: the variables of torchrun, or SLURM's; of one it need know nothing.

    SLURM's requeueing is left to the batch script: a run that is started again goes on from its checkpoint by itself. Raises a
    `UserError` for a SLURM job that Lightning refuses.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if num == 1:
        return LightningEnvironment()
    if "RANK" in os.environ:
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise UserError(f"SLURM: {error}") from None


def is_first() -> bool:
    """Whether this process writes for those that work together: always, if it works alone."""
    return _team == 1 or rank() == 0


def own_rows(batch_size: int) -> range:
    """The rows of a global batch that this process computes; the number of processes divides it."""
    size = batch_size // _team
    return range(batch_size) if _team == 1 else range(rank() * size, (rank() + 1) * size)


def shared(work: Callable[[], T]) -> T:
    """What the first process's work returns, or its `UserError`, in every process: the others wait for it."""
    if _team == 1:
        return work()
    import torch.distributed as dist

    found: list[tuple[T | None, str | None]] = [(None, None)]
    if is_first():
        try:
            found = [(work(), None)]
        except UserError as error:
            found = [(None, str(error))]
    dist.broadcast_object_list(found, src=0)
    result, error_line = found[0]
    if error_line is not None:
        raise UserError(error_line)
    return result  # type: ignore[return-value]


def mean(values: "Tensor") -> "Tensor":
    """The mean over the processes of what each has, of one shape."""
    if _team == 1:
        return values
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total)
    return total / _team


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any of the processes; it passes through the CPU, so that no GPU waits for it."""
    if _team == 1:
        return flags
    import torch
    import torch.distributed as dist

    found = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in found.tolist())
