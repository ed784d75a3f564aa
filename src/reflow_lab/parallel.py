"""Which of several processes this one is, as torchrun or SLURM tell it."""

import os


def _number(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def rank() -> int:
    """The number of this process, from 0: RANK of torchrun, SLURM_PROCID of srun."""
    return _number("RANK", "SLURM_PROCID", default=0)


def world_size() -> int:
    """How many processes were started together: WORLD_SIZE of torchrun, SLURM_NTASKS of srun."""
    return max(1, _number("WORLD_SIZE", "SLURM_NTASKS", default=1))


def take_own_gpu() -> None:
    """Make this process's own GPU, by its number on this machine, the one that `cuda` means."""
    import torch  # here: what only asks for the rank starts light

    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", "SLURM_LOCALID", default=0) % torch.cuda.device_count())
