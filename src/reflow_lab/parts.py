"""From a composed configuration to the parts that the verbs put together."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .data.sources import DataSource
from .errors import UserError, bad_value, require
from .networks import files
from .networks.precision import InPrecision, require_precision


def plain(cfg: Any) -> Any:
    """A configuration node as plain resolved containers, for recipes and metadata."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def device(cfg: DictConfig) -> torch.device:
    """The device that `trainer.accelerator` means for work outside a trainer."""
    name = cfg.trainer.accelerator
    return torch.device("cuda" if name in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")


def data_source(cfg: DictConfig) -> DataSource:
    """The data set, one object for one configuration, so that its images are read once; nothing is read yet."""
    return _data_source(json.dumps(plain(cfg.data), sort_keys=True))


@functools.lru_cache(maxsize=4)
def _data_source(config: str) -> DataSource:
    return instantiate(json.loads(config))


def network(cfg: DictConfig) -> nn.Module:
    """A fresh network, its weights drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return instantiate(cfg.net)


def check(cfg: DictConfig) -> None:
    """Raise a `UserError` for values that no constructor sees."""
    for key, low in (("training.batch_size", 1), ("training.num_heldout", 1), ("nfe", 1), ("seed", 0)):
        value = OmegaConf.select(cfg, key)
        require(isinstance(value, int) and value >= low, key, value, f"must be a whole number of at least {low}")
    for key in ("training.total_kimg", "training.warmup_kimg"):
        value = OmegaConf.select(cfg, key)
        require(isinstance(value, int | float) and value >= 0, key, value, "must be a number of at least 0")
    for key in ("training.lr", "training.gradient_clip", "trainer.log_every_kimg", "trainer.diagnostics_every_kimg"):
        value = OmegaConf.select(cfg, key)
        off = value is None and key == "training.gradient_clip"
        require(off or (isinstance(value, int | float) and value > 0), key, value, "must be a positive number")
    require(cfg.seed < 2**31, "seed", cfg.seed, "must be below 2^31")
    require(isinstance(cfg.t_max, int | float) and 0 < cfg.t_max <= 1, "t_max", cfg.t_max, "must lie in (0, 1]")
    require_precision(cfg.precision)


@dataclass(frozen=True)
class Teacher:
    """The pretrained flow that makes the pairs and starts the student: a weight file and its description."""

    path: Path
    hash: str
    description: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes that the network takes; 0 for an unconditional one."""
        return int(self.description["num_classes"])

    @property
    def t_max(self) -> float:
        """Where its sampling starts."""
        return float(self.description["t_max"])

    def velocity(self, cfg: DictConfig) -> InPrecision:
        """The network in the chosen precision, on its device."""
        return InPrecision(files.load(self.path), cfg.precision).to(device(cfg)).eval()


def sample_shape(source: DataSource) -> tuple[int, ...]:
    """The shape of one sample: (c, h, w), or (dim,) for points."""
    return source.split("train").shape


def teacher(cfg: DictConfig, key: str = "teacher.path") -> Teacher:
    """The configured teacher, checked against the data: resolution, channels and classes."""
    if cfg.teacher.path is None:
        raise bad_value(key, None, "needs a run folder or a weight file, or teacher=fashion_mnist (ships with the package)")
    return described(files.find(cfg.teacher.path, cfg.teacher.profile), data_source(cfg), key)


def described(path: Path, source: DataSource, key: str) -> Teacher:
    """A weight file with its description, checked against the data."""
    digest = files.weights_hash(path)
    description = files.describe(path)
    shape, own = tuple(description["shape"]), sample_shape(source)
    require(shape == own, key, path, f"makes samples of shape {shape}, but the data has {own}")
    classes = int(description["num_classes"])
    require(classes in (0, source.num_classes), key, path, f"takes {classes} classes, but the data has {source.num_classes}")
    return Teacher(path, digest, description)


def net_classes(cfg: DictConfig) -> int:
    """Classes that the configured network takes."""
    inner = cfg.net.get("network", cfg.net)
    return int(inner.get("num_classes", 0))


def require_run(run: str | None) -> str:
    """The `run` key of evaluate and sample."""
    if not run:
        raise UserError("run=null: give a run folder or a weight file, e.g. run=outputs/train/0123456789abcdef")
    return str(run)
