"""A run's life: bars, log lines, checkpoints, ctrl-C, and an end before the weights are lost to NaN."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import Logger

from .. import parallel
from ..artifacts import write_atomically
from ..errors import UserError
from ..progress import Bar
from .module import FlowModule


class Steps:
    """An endless loader without content: the module derives each batch from its step."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class DurableCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their target, synced and renamed: the previous one stays until the next is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `CheckpointIO`."""
        write_atomically(Path(path), lambda p: torch.save(checkpoint, p))


class JSONLines(Logger):
    """Metrics as JSON lines, one dictionary a call; on resume the lines after the checkpoint are cut."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """See `Logger`."""
        return "jsonl"

    @property
    def version(self) -> str:
        """See `Logger`."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is a file of its own."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that was cut short."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(self.path, lambda p: p.write_text("".join(line + "\n" for line in kept)))


class Report(L.Callback):
    """A progress bar, and every `every_kimg` a log line; stops the run when the loss is no longer finite."""

    def __init__(self, description: str, every_kimg: float) -> None:
        self.description, self.every_kimg = description, every_kimg

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        assert isinstance(pl_module, FlowModule)
        seen = trainer.global_step * pl_module.batch_size
        self.bar = Bar(self.description, trainer.max_steps * pl_module.batch_size, "images", seen)
        self.bar.__enter__()
        self.clock, self.step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance the bar; log when the step crosses a multiple of the interval, and at the last step."""
        assert isinstance(pl_module, FlowModule)
        if pl_module.crossed(self.every_kimg) or trainer.global_step == trainer.max_steps:
            self._log(trainer, pl_module)
        self.bar.advance(pl_module.batch_size)

    def _log(self, trainer: L.Trainer, module: FlowModule) -> None:
        now = time.monotonic()
        metrics = {
            **numbers(module),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "kimg": module.kimg,
            "images_per_s": (trainer.global_step - self.step) * module.batch_size / max(now - self.clock, 1e-9),
        }
        self.clock, self.step = now, trainer.global_step
        require_finite(metrics, trainer)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        self.bar.advance(0, f"loss {metrics['loss_unweighted']:.3g}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self.bar.__exit__()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if hasattr(self, "bar"):
            self.bar.__exit__()


def numbers(module: FlowModule) -> dict[str, float]:
    """What must stay finite, of the last step's global batch: every process asks, every one gets the same."""
    own = torch.stack((module.losses.total.detach().mean(), module.losses.raw.mean()))
    loss, unweighted = parallel.mean(own).tolist()
    return {"loss": loss, "loss_unweighted": unweighted, "gradient_norm": module.gradient_norm.item()}


def require_finite(metrics: dict[str, float], trainer: L.Trainer) -> None:
    """Raise a `UserError` if a loss or gradient is NaN or infinite; the last checkpoint is from before that."""
    bad = [k for k in ("loss", "loss_unweighted", "gradient_norm") if not abs(metrics[k]) < float("inf")]
    if bad:
        what = f"{bad[0]}={metrics[bad[0]]} at step {trainer.global_step}"
        raise UserError(f"{what}: stopped, the last checkpoint is kept; try a lower training.lr or a training.gradient_clip")


class Clock(L.Callback):
    """Seconds of training, summed over its resumes: the time of steps that a kill undid is not in them."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """The sum so far."""
        return self.before + time.monotonic() - self.started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self.started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's sum."""
        self.before = state_dict["seconds"]


class Checkpoints(L.Callback):
    """One checkpoint, replaced every `every_s` seconds and on ctrl-C: the first signal lets the step finish, then saves.

    A second one of the same kind ends at once; torchrun sends SIGTERM after the terminal's SIGINT. Of several processes each
    saves and stops when one of them wants to, since they save together.
    """

    def __init__(self, path: Path, every_s: float) -> None:
        self.path, self.every_s = path, every_s
        self.came: set[int] = set()  #: signals
        self.interrupted = False  #: whether any process got one

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if number in self.came:
            raise KeyboardInterrupt
        self.came.add(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over SIGINT and SIGTERM."""
        self.previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.saved = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save when it is time, and stop when asked."""
        assert isinstance(pl_module, FlowModule)
        self.interrupted, due = parallel.any_of(bool(self.came), time.monotonic() - self.saved > self.every_s)
        if self.interrupted:
            trainer.should_stop = True
        if self.interrupted or due:
            require_finite(numbers(pl_module), trainer)  # before the last good state is overwritten
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back; one that came after the last step counts, too."""
        self.teardown(trainer, pl_module, "fit")
        (self.interrupted,) = parallel.any_of(bool(self.came))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in getattr(self, "previous", {}).items():
            signal.signal(number, handler)
