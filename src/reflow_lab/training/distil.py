"""A flow map from its configuration: the objective with its teacher, the guidance of that, and what of all this is recorded."""

import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import parts
from ..artifacts import write_json
from ..errors import require
from ..flow_maps.adversarial import Adversarial, Adversary, FineTuning, last_weight
from ..flow_maps.alignment import align
from ..flow_maps.distillation import Distillation
from ..flow_maps.objectives import Matching
from ..inf import guidance
from ..networks import files
from ..networks.discriminator import Discriminator

SOURCES = ("teacher", "data")  #: of the velocity that is learned


def is_asked(cfg: DictConfig) -> bool:
    """Whether a flow map is to be trained, not a velocity."""
    return OmegaConf.select(cfg, "flow_map.objective") is not None


def check(cfg: DictConfig) -> None:
    """Raise a `UserError` for a flow map that could not be trained, before any work."""
    options = cfg.flow_map
    require(options.velocity in SOURCES, "flow_map.velocity", options.velocity, f"allowed: {', '.join(SOURCES)}")
    for key in ("align_steps", "warmup_steps"):
        parts.require_whole(f"flow_map.{key}", options[key], 0)
    for key in ("c", "warmup_cap", "times.share_equal"):
        value = OmegaConf.select(options, key, default=0)
        off = key == "c" and value is None
        require(off or parts.is_number(value), f"flow_map.{key}", value, "must be a number")
    lam_guid, how = parts.plain(options.guidance.lam_guid), options.guidance.how
    pair = isinstance(lam_guid, list) and len(lam_guid) == 2 and all(map(parts.is_number, lam_guid))
    require(pair, "flow_map.guidance.lam_guid", lam_guid, "must be two numbers")
    allowed = "is for a guided teacher: flow_map/guidance=auto or cfg"
    require(how is not None or lam_guid == [1, 1], "flow_map.guidance.lam_guid", lam_guid, allowed)
    untaught = "has no teacher to guide: flow_map.velocity=teacher"
    require(how is None or options.velocity == "teacher", "flow_map.velocity", options.velocity, untaught)
    asked = Distillation(matching(cfg), instantiate(options.times), None, tuple(lam_guid)).matching.objective
    nobody = f"{type(asked).__name__} asks a teacher where the student arrives: flow_map.velocity=teacher"
    require(asked.asks_at_start or options.velocity == "teacher", "flow_map.velocity", options.velocity, nobody)
    if is_adversarial(cfg):
        check_adversarial(cfg)


def announce(cfg: DictConfig, num_steps: int) -> None:
    """Say on stderr of a warm-up that ends after the training, and of strengths that fine-tuning lets be forgotten."""
    rises = cfg.flow_map.warmup_steps
    if rises > num_steps:
        said = f"flow_map.warmup_steps={rises}: training has {num_steps} steps, so the derivative never counts as it should"
        print(said, file=sys.stderr)
    learned = files.describe(files.find(cfg.training.start)).get("lam_guid") if is_adversarial(cfg) else None
    told = parts.plain(cfg.flow_map.guidance.lam_guid)
    if learned not in (None, told):
        print(f"flow_map.guidance.lam_guid={told}: the flow map that it starts from learned {learned}", file=sys.stderr)


def is_adversarial(cfg: DictConfig) -> bool:
    """Whether a discriminator takes part."""
    return OmegaConf.select(cfg, "flow_map.adversarial._target_") is not None


def check_adversarial(cfg: DictConfig) -> None:
    """Raise a `UserError` unless it is a distilled flow map that is fine-tuned, and its samples suit the discriminator."""
    start, warmup = cfg.training.start, cfg.flow_map.warmup_steps
    distilled = start not in ("teacher", "scratch") and files.jumps(files.describe(files.find(start)))
    require(distilled, "training.start", start, "must be the run of a flow map: flow_map/adversarial fine-tunes one")
    allowed = "must be 0 with flow_map/adversarial: the flow map has had its warm-up"
    require(warmup == 0, "flow_map.warmup_steps", warmup, allowed)
    with torch.device("meta"):
        last_weight(instantiate(cfg.net))
        discriminator(cfg, instantiate(cfg.flow_map.adversarial))


def discriminator(cfg: DictConfig, how: Adversarial) -> Discriminator:
    """A fresh one for these samples and classes, its weights drawn from the run's seed."""
    return how.discriminator(parts.sample_shape(parts.data_source(cfg)), parts.net_classes(cfg), cfg.seed)


def fine_tuning(cfg: DictConfig, regulariser: Distillation, network: nn.Module) -> FineTuning:
    """The objective of adversarial fine-tuning of a network, with a fresh discriminator on the chosen device."""
    how = instantiate(cfg.flow_map.adversarial)
    judge = discriminator(cfg, how).to(parts.device(cfg))
    return FineTuning(regulariser, Adversary(how, judge, last_weight(network), cfg.trainer.log_every_kimg))


def matching(cfg: DictConfig) -> Matching:
    """The objective with its stabilisers."""
    options = cfg.flow_map
    return Matching(instantiate(options.objective), options.c, options.warmup_steps, options.warmup_cap)


def objective(cfg: DictConfig) -> Distillation:
    """What training minimises; the teacher and its guide come in the chosen precision, on the chosen device."""
    options, teacher = cfg.flow_map, None
    if options.velocity == "teacher":
        run = parts.teacher(cfg)
        teacher = guided(cfg).velocity(run.velocity(cfg), cfg.precision, parts.device(cfg)).requires_grad_(False)
        if cfg.training.compile:
            teacher.compile()
    low, high = options.guidance.lam_guid
    return Distillation(matching(cfg), instantiate(options.times), teacher, (low, high))


def guided(cfg: DictConfig) -> guidance.Checked:
    """The guidance of the teacher, its guide found."""
    how = cfg.flow_map.guidance.how
    given = None if how is None else instantiate(how, weight=1.0)  # each sample has a strength of its own
    return guidance.check(given, parts.teacher(cfg).description, "flow_map.guidance.how")


def description(cfg: DictConfig) -> dict[str, Any]:
    """What a weight file says of a flow map: the strengths and the jumps that it was trained for."""
    only = instantiate(cfg.flow_map.objective).only_to_data
    return {"lam_guid": parts.plain(cfg.flow_map.guidance.lam_guid)} | ({"only_to_data": True} if only else {})


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """The settings that change the result; a guide is told by its hash, see `inputs`."""
    settings = parts.plain(cfg.flow_map)
    if not is_adversarial(cfg):
        del settings["adversarial"]
    return {**settings, "guidance": settings["guidance"]["lam_guid"]}


def inputs(cfg: DictConfig) -> dict[str, Any]:
    """What else it is made from: teacher and guide, by their hashes."""
    if cfg.flow_map.velocity != "teacher":
        return {"teacher": None}
    return {"teacher": parts.teacher(cfg).hash, "guidance": guided(cfg).recipe}


def aligned(cfg: DictConfig, network: nn.Module, start: Path | None, folder: Path) -> None:
    """Let a flow map that starts from a velocity learn its time embedding; the errors go to align.json in the run's folder."""
    begun = (folder / "last.ckpt").exists()
    if start is None or begun or not cfg.flow_map.align_steps or files.jumps(files.describe(start)):
        return
    inner, before = (getattr(net, "network", net) for net in (network, files.load(start)))
    errors = align(inner, before, cfg.flow_map.align_steps, cfg.seed)
    write_json(folder / "align.json", {"relative_error": errors})
    print(f"time embedding aligned with the teacher's: relative error {errors[0]:.2g}, now {errors[-1]:.2g}")
