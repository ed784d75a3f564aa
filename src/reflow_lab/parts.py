"""From a composed configuration to the parts that the verbs put together."""

import functools
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from . import parallel
from .data.autoencoder import Codec
from .data.sources import DataSource, Encoded
from .errors import UserError, bad_value, require
from .inf import guidance as guiding
from .networks import files
from .networks.precision import InPrecision, require_precision


def plain(cfg: Any) -> Any:
    """A configuration node as plain resolved containers, for recipes and metadata."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


ACCELERATORS = ("auto", "cpu", "gpu")  #: auto is a CUDA device where there is one


def device(cfg: DictConfig) -> torch.device:
    """The device that `trainer.accelerator` means; a GPU with its number, for which one is current differs between threads."""
    if cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def device_name(cfg: DictConfig) -> str:
    """The name of that device, which goes beside every time that was measured on it."""
    found = device(cfg)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else processor()


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


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
        require_whole(key, OmegaConf.select(cfg, key), low)
    for key in ("training.total_kimg", "training.warmup_kimg", "trainer.checkpoint_every_s"):
        value = OmegaConf.select(cfg, key)
        require(is_number(value) and value >= 0, key, value, "must be a number of at least 0")
    intervals = ("trainer.log_every_kimg", "trainer.diagnostics_every_kimg", "trainer.few_step_every_kimg")
    for key in ("training.lr", "training.gradient_clip", "training.snapshot_every_kimg", *intervals):
        value = OmegaConf.select(cfg, key)
        off = value is None and key in ("training.gradient_clip", "training.snapshot_every_kimg")
        require(off or (is_number(value) and value > 0), key, value, "must be a positive number")
    dropout = cfg.training.label_dropout
    require(is_number(dropout) and 0 <= dropout <= 1, "training.label_dropout", dropout, "must be a probability in [0, 1]")
    require(cfg.seed < 2**31, "seed", cfg.seed, "must be below 2^31")
    require(is_number(cfg.t_max) and 0 < cfg.t_max <= 1, "t_max", cfg.t_max, "must lie in (0, 1]")
    require_precision(cfg.precision)
    check_lists(cfg)
    check_paths(cfg)
    check_machine(cfg)


def is_number(value: object) -> bool:
    """Whether a value is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_whole(key: str, value: Any, low: int) -> None:
    """Raise a `UserError` unless the value is a whole number of at least `low`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    require(fits, key, value, f"must be a whole number of at least {low}")


def check_lists(cfg: DictConfig) -> None:
    """Raise a `UserError` for lists of numbers that are none."""
    betas, halflives = plain(cfg.training.betas), plain(cfg.training.ema_halflives_mimg)
    pair = isinstance(betas, list) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    require(pair, "training.betas", betas, "must be two numbers in [0, 1)")
    positive = isinstance(halflives, list) and all(is_number(halflife) and halflife > 0 for halflife in halflives)
    require(positive, "training.ema_halflives_mimg", halflives, "must be a list of positive numbers")
    check_sigma_rels(plain(cfg.training.ema_sigma_rels), cfg.training.snapshot_every_kimg)


def check_sigma_rels(sigma_rels: Any, every_kimg: float | None) -> None:
    """Raise a `UserError` for widths that no power-function average has, and for snapshots of none."""
    widths = isinstance(sigma_rels, list) and all(is_number(s) and 0 < s < 0.288 and s == round(s, 3) for s in sigma_rels)
    allowed = "must be a list of numbers between 0 and 0.288, to three decimals, as snapshots are named by them"
    require(widths and len({*sigma_rels}) == len(sigma_rels), "training.ema_sigma_rels", sigma_rels, allowed)
    nothing = "there is nothing to store: give training.ema_sigma_rels too, e.g. [0.05,0.1]"
    require(every_kimg is None or bool(sigma_rels), "training.snapshot_every_kimg", every_kimg, nothing)


def check_paths(cfg: DictConfig) -> None:
    """Raise a `UserError` where a path or a name is something else, e.g. a number."""
    for key in ("training.start", "teacher.path", "teacher.profile", "pairs.folder", "run", "profile"):
        value = OmegaConf.select(cfg, key)
        missing = value is None and key != "training.start"
        require(missing or isinstance(value, str | Path), key, value, "must be a text")


def check_machine(cfg: DictConfig) -> None:
    """Raise a `UserError` for devices that are not there."""
    name = cfg.trainer.accelerator
    require(name in ACCELERATORS, "trainer.accelerator", name, f"allowed: {', '.join(ACCELERATORS)}")
    there = name != "gpu" or torch.cuda.is_available()
    require(there, "trainer.accelerator", name, "no CUDA device here; allowed: auto, cpu")
    require_whole("trainer.num_nodes", cfg.trainer.num_nodes, 1)
    devices = cfg.trainer.devices
    if devices == "auto":
        return
    whole = isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1
    require(whole, "trainer.devices", devices, "must be a whole number of at least 1, or auto")
    visible = torch.cuda.device_count() if device(cfg).type == "cuda" else devices
    require(devices <= visible, "trainer.devices", devices, f"this process sees {visible} GPUs")


def num_devices(cfg: DictConfig) -> int:
    """Processes of a training on each machine, one a device; auto: those that were started, or else one for each GPU here."""
    if cfg.trainer.devices != "auto":
        return int(cfg.trainer.devices)
    if parallel.world_size() > 1:
        return max(1, parallel.world_size() // cfg.trainer.num_nodes)
    return torch.cuda.device_count() if device(cfg).type == "cuda" else 1


def num_processes(cfg: DictConfig) -> int:
    """Processes that train a run together. Raises a `UserError` if they cannot share a batch, or if others were started."""
    num, nodes, batch_size = num_devices(cfg) * cfg.trainer.num_nodes, cfg.trainer.num_nodes, cfg.training.batch_size
    devices = (
        f"trainer.devices={cfg.trainer.devices} on {nodes} machines" if nodes > 1 else f"trainer.devices={cfg.trainer.devices}"
    )
    allowed = f"is the batch of all {num} processes together ({devices}) and must be a multiple of that number"
    require(batch_size % num == 0, "training.batch_size", batch_size, allowed)
    begun = parallel.world_size()
    require(nodes == 1 or begun > 1, "trainer.num_nodes", nodes, "several machines need srun or torchrun to start the processes")
    allowed = f"makes {num} processes with trainer.num_nodes={nodes}, but {begun} were started together"
    require(num == 1 or begun in (1, num), "trainer.devices", cfg.trainer.devices, allowed)
    return num


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


def guidance(cfg: DictConfig, run: Teacher, key: str = "inf.guidance") -> guiding.Checked:
    """The guidance under a key, inf.guidance or pairs.guidance, checked against the flow that it guides."""
    return guiding.check(instantiate(OmegaConf.select(cfg, key)), run.description, key)


def velocity(cfg: DictConfig, run: Teacher, key: str = "inf.guidance") -> nn.Module:
    """The velocity to sample from: the run's network, guided as the key says."""
    return guidance(cfg, run, key).velocity(run.velocity(cfg), cfg.precision, device(cfg))


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
    if isinstance(source, Encoded) and (about := description.get("latents")):
        others = "makes latents of another autoencoder than data.path has, or of another data.mean or data.std"
        require(Codec.described(about).suits(source.codec), key, path, others)
    return Teacher(path, digest, description)


def settle_net(cfg: DictConfig) -> None:
    """Settle what network `net` means: the teacher's for `net=teacher`; it takes s where a flow map is trained, and else not."""
    settle_teachers_net(cfg)
    trained = OmegaConf.select(cfg, "flow_map.objective") is not None
    inner = cfg.net.get("network", cfg.net)
    if trained or "jumps" in inner:
        with open_dict(cfg):
            inner.jumps = trained


def settle_teachers_net(cfg: DictConfig) -> None:
    """Put the teacher's own network in the place of `net=teacher`, by its weight file; whatever else stands under `net` goes.

    Everything after this sees plain settings. Raises a `UserError` where there is no teacher.
    """
    if cfg.net.get("from") is None:
        return
    require(cfg.net["from"] == "teacher", "net.from", cfg.net["from"], "must be teacher: the network of its weight file")
    require(cfg.teacher.path is not None, "net", "teacher", "needs a teacher, whose network it takes: this has teacher=none")
    path = files.find(cfg.teacher.path, cfg.teacher.profile)
    net = files.describe(path)["net"]
    files.require_own(net, files.NETWORKS, path)
    cfg.net = net


def net_classes(cfg: DictConfig) -> int:
    """Classes that the configured network takes."""
    inner = cfg.net.get("network", cfg.net)
    return int(inner.get("num_classes", 0))


def require_run(run: str | None) -> str:
    """The `run` key of evaluate and sample."""
    if not run:
        raise UserError("run=null: give a run folder or a weight file, e.g. run=outputs/train/0123456789abcdef")
    return str(run)
