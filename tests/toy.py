"""Configurations and a teacher on Gaussian points, for which everything is known: shared by the tests of pairs and training."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from reflow_lab import parts
from reflow_lab.flow import T_MAX
from reflow_lab.networks import files
from reflow_lab.paths import conf_dir

SMALL = [
    "~experiment",
    "data=gaussian",
    "data.num_points=400",
    "net=mlp",
    "net.network.width=16",
    "net.network.num_layers=1",
    "precision=32-true",
    "trainer=cpu",
    "pairs.num_backward=96",
    "pairs.num_forward=64",
    "pairs.nfe=9",
    "pairs.batch_size=16",
    "pairs.shard_size=40",
    "pairs.dtype=float32",
]


def config(verb: str, outputs: Path, *overrides: str) -> DictConfig:
    """The configuration of a verb on the toy."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(verb, [*SMALL, f"outputs={outputs}", *overrides])


def teacher_file(path: Path, *overrides: str, exact: bool = True) -> Path:
    """Weights of the toy's network; `exact`: all zero, with which the preconditioning alone is the velocity of N(0, 1/4)."""
    cfg = config("train", path.parent, "teacher=none", *overrides)
    network = instantiate(cfg.net)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter) if exact else torch.nn.init.normal_(parameter, std=0.3)
    description = {"net": parts.plain(cfg.net), "shape": [2], "num_classes": parts.net_classes(cfg), "t_max": T_MAX}
    files.save(network, path, description)
    return path
