"""The loggers of a training beside the JSON lines: Weights & Biases, or any of Lightning's."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from PIL.Image import Image

from .. import parts, tracking
from ..parallel import rank


class RunLogger(Logger):
    """A run of Weights & Biases as Lightning's logger: one row a step, against the images seen."""

    def __init__(self, run: Any, outputs: Path, batch_size: int) -> None:
        super().__init__()
        self.run, self.outputs, self.batch_size = run, outputs, batch_size

    @property
    def name(self) -> str:
        """See `Logger`."""
        return "wandb"

    @property
    def version(self) -> str:
        """See `Logger`."""
        return str(self.run.id)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run was given its configuration when it was opened."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log one row; a step that the server has from before a kill is not told again: it came out the same."""
        assert step is not None
        if step >= self.run.starting_step:
            self.run.log({**metrics, tracking.SEEN: step * self.batch_size}, step=step)

    def log_image(self, key: str, images: list[Image], step: int) -> None:
        """Log one picture, a grid, and keep it: a run that is opened again has it too."""
        import wandb

        (picture,) = images
        path = tracking.keep_picture(self.run, self.outputs, key, picture, step)
        self.log_metrics({key: wandb.Image(str(path))}, step)


class Loggers:
    """What is configured, opened by the first call, once the pairs are there; as a context manager, it ends what it opened."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg, self.folder, self.stack = cfg, folder, contextlib.ExitStack()
        self.settings = tracking.chosen(cfg)
        self.run: Any = None

    def __call__(self) -> list[Logger]:
        """The loggers; none in all but the first of several processes."""
        if self.cfg.logger is None or self.cfg.logger.get("_target_") is None or rank() > 0:
            return []
        if self.settings is not None:
            return [RunLogger(self.opened(), self.folder.parents[1], self.cfg.training.batch_size)]
        return [] if tracking.is_ours(self.cfg) else [self.of_lightning()]

    def of_lightning(self) -> Logger:
        """A logger of Lightning's own, e.g. TensorBoardLogger, with the configuration."""
        found: Logger = instantiate(self.cfg.logger, _convert_="all")
        found.log_hyperparams(parts.plain(self.cfg))
        self.stack.callback(found.finalize, "success")
        return found

    def opened(self) -> Any:
        """The run of Weights & Biases, with what it logged before."""
        assert self.settings is not None
        if self.run is None:
            about = tracking.about_training(self.cfg, self.folder, self.settings)
            outputs = self.folder.parents[1]
            self.run = self.stack.enter_context(tracking.opened(self.settings, outputs, about))
            print(tracking.where(self.run, outputs))
            tracking.replay(self.run, self.folder, self.cfg.training.batch_size)
        return self.run

    def trained(self) -> None:
        """Log the weights, which are written now."""
        if self.settings is not None:
            tracking.trained(self.opened(), self.settings, self.folder)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.__exit__(kind, error, trace)
