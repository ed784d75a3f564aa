"""The verb `train`: a base flow or a ReFlow, from a configuration to a folder of weights."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import parallel, parts, tracking
from ..artifacts import Artifact, artifact, read_json, write_json
from ..data.augment import AUGMENT_DIM, UNCHANGED, Augmentation
from ..data.sets import SampleSet, resident
from ..data.sources import DataSource, Encoded, decoder, has_pixels
from ..dyn.objective import Objective
from ..errors import UserError, require
from ..flow_maps.adversarial import FineTuning
from ..flow_maps.distillation import Distillation
from ..inf.sampler import advise, require_suited
from ..lrn import online, pairs
from ..lrn.couplings import (
    HELD_OUT,
    STOCHASTIC,
    STORED,
    Coupling,
    IndependentPairs,
    MinibatchOTPairs,
    Mixture,
    Pairs,
    Prefetched,
    shares,
)
from ..networks import files
from ..networks.precision import EAGER_MASKS, InPrecision
from . import distil, processes
from .diagnostics import ByTime, Mix
from .ema import EMA, Snapshots
from .few_step import FewStep
from .jumps import ByJump
from .lifecycle import Checkpoints, Clock, DurableCheckpoints, JSONLines, Report, Steps
from .loggers import Loggers
from .module import FlowModule
from .overfitting import Overfitting

VERSION = 1  #: of the recipe: increment when the same configuration means another result
BIASED = "dyn.weight or dyn.metric: the minimiser is not E[x0 | x_t] under"
NEW = ".jump."  #: in the names of the weights that a flow map has beside its teacher's
CONFIG_KEYS = ("net", "dyn", "lrn", "training", "seed", "t_max", "precision")  #: what changes the weights


def train(cfg: DictConfig) -> Path:
    """Train what the configuration describes, or go on with it, or return at once if it is done; the run's folder.

    Where several processes are to train it, they are started, unless torchrun or srun has done so.
    """
    parts.check(cfg)
    made, num = plan(cfg), parts.num_processes(cfg)
    if num == 1 or parallel.world_size() > 1:
        train_here(cfg, made)
    elif not made.is_done():
        with tracking.making(**tracking.made_by()):  # which the processes cannot ask Hydra for
            processes.launch(cfg, num)
    if num == 1 or parallel.rank() == 0:
        print(f"run: {made.folder}")
    return made.folder


def train_here(cfg: DictConfig, made: Artifact) -> None:
    """This process's part of the training: all, or some rows of each batch. The first of several holds the lock and writes."""
    with parallel.together(parts.num_processes(cfg)), made.locked() if parallel.is_first() else nullcontext():
        if not parallel.shared(partial(begun, cfg, made)):
            fit(cfg, made)


def begun(cfg: DictConfig, made: Artifact) -> bool:
    """Whether the run is done; else its folder is made ready."""
    if made.is_done():
        return True
    made.begin()
    OmegaConf.save(cfg, made.folder / "config.yaml", resolve=True)
    write_json(made.folder / "lineage.json", tracking.lineage(made, origin(cfg)))
    return False


def plan(cfg: DictConfig) -> Artifact:
    """The artifact of a run: the configuration that changes it, and the hashes of data, start and pairs; `net` is settled."""
    parts.settle_net(cfg)
    source = parts.data_source(cfg)
    with torch.device("meta"):
        instantiate(cfg.net)  # settings that no network takes are refused before any work
    if distil.is_asked(cfg):
        distil.check(cfg)
    elif cfg.training.start != "scratch":
        require_velocity(start_file(cfg), start_key(cfg))
    require_suited(instantiate(cfg.inf.solver), description(cfg), instantiate(cfg.inf.guidance))
    mixture = instantiate(cfg.lrn.coupling)
    kinds = mixture.weights if cfg.training.total_kimg else {}
    require_labels(cfg, kinds)
    require_augmentable(cfg, kinds)
    stores = {kind: pairs.plan(cfg, kind) for kind in kinds if kind in STORED}
    drawn = {"online": online.recipe(cfg)} if "online" in kinds else {}
    inputs: dict[str, Any] = {
        "data": source.split("train").content_hash,
        "pairs": {kind: store.key for kind, store in stores.items()} | drawn,
        "start": None if cfg.training.start == "scratch" else files.weights_hash(start_file(cfg)),
    }
    if cfg.training.total_kimg:
        require_steps(cfg, mixture, {kind: store.recipe["count"] for kind, store in stores.items()})
    if cfg.training.start != "scratch":
        require_same_net(cfg, start_file(cfg), start_key(cfg))
    config = {key: parts.plain(cfg[key]) for key in CONFIG_KEYS}
    del config["training"]["start"]  # a path; its content's hash is among the inputs
    if distil.is_asked(cfg):
        config = {key: value for key, value in config.items() if key != "dyn"} | {"flow_map": distil.recipe(cfg)}
        inputs |= distil.inputs(cfg)
    return artifact(cfg.outputs, "train", VERSION, config=config, inputs=inputs)


def require_steps(cfg: DictConfig, mixture: Mixture, stored: dict[str, int]) -> None:
    """Raise a `UserError` if training would have no step, or no full batch of some kind of pair, of which so many are stored."""
    options = cfg.training
    none = f"is no step at all: a batch has {options.batch_size} samples (0 keeps the starting weights)"
    require(steps(cfg) > 0, "training.total_kimg", options.total_kimg, none)
    from_data = dict.fromkeys(STOCHASTIC, len(parts.data_source(cfg).split("train")))
    mixture.require_room({**stored, **from_data, "online": HELD_OUT}, options.batch_size, options.num_heldout)


def require_labels(cfg: DictConfig, kinds: Iterable[str]) -> None:
    """Raise a `UserError` if the network is conditional and a kind of pair lacks its classes, or has no labels to drop."""
    classes, dropout = parts.net_classes(cfg), cfg.training.label_dropout
    none = "drops the labels of a conditional network, and this one takes none: set net.network.num_classes"
    require(classes > 0 or dropout == 0, "training.label_dropout", dropout, none)
    for kind in kinds if classes else ():
        found = parts.data_source(cfg).num_classes if kind in STOCHASTIC else parts.teacher(cfg).num_classes
        require(found == classes, "net.network.num_classes", classes, f"{kind} pairs come with {found} classes")


def require_augmentable(cfg: DictConfig, kinds: Iterable[str]) -> None:
    """Raise a `UserError` if images are to be flipped or augmented where no image gets fresh noise, or no labels go in."""
    flips, probability = cfg.training.flips, cfg.training.augment
    require(isinstance(flips, bool), "training.flips", flips, "must be true or false")
    fits = parts.is_number(probability) and 0 <= probability <= 1
    require(fits, "training.augment", probability, "must be a probability in [0, 1]")
    fresh = "acts on images with fresh noise (lrn/coupling=independent or minibatch_ot), not on stored or online pairs"
    for key, value in {"training.flips": flips, "training.augment": probability}.items() if kinds else ():
        require(not value or any(kind in STOCHASTIC for kind in kinds), key, value, f"{fresh}; pairs.flips is for stored ones")
        require(not value or has_pixels(parts.data_source(cfg)), key, value, "is for images: these data are points or latents")
    taken = int(cfg.net.get("network", cfg.net).get("augment_dim", 0))
    allowed = f"needs a network that takes {AUGMENT_DIM} augmentation labels; net.network.augment_dim={taken}"
    require(not probability or taken == AUGMENT_DIM, "training.augment", probability, allowed)
    untold = "must be 0 for a flow map: neither teacher nor discriminator is told what was done to an image"
    require(not probability or not distil.is_asked(cfg), "training.augment", probability, untold)


def start_file(cfg: DictConfig) -> Path:
    """The weights that `training.start` means: the teacher's, or a run folder's or a file's."""
    start = cfg.training.start
    return parts.teacher(cfg).path if start == "teacher" else files.find(start)


def start_key(cfg: DictConfig) -> str:
    """The key that says where the starting weights lie."""
    return "teacher.path" if cfg.training.start == "teacher" else "training.start"


def origin(cfg: DictConfig) -> Path | None:
    """The weight file that training starts from; None from scratch."""
    return None if cfg.training.start == "scratch" else start_file(cfg)


def require_velocity(path: Path, key: str) -> None:
    """Raise a `UserError` for the weights of a flow map, which a velocity's network cannot take."""
    jumps = "is a flow map, whose weights no velocity can take over: training.start=scratch, or the velocity it was made from"
    require(not files.jumps(files.describe(path)), key, path, jumps)


def start(cfg: DictConfig) -> nn.Module:
    """The network at its starting point."""
    network = parts.network(cfg)
    if cfg.training.start != "scratch":
        files.load_into(network, start_file(cfg), start_key(cfg), fresh=NEW if distil.is_asked(cfg) else None)
    return network


def require_same_net(cfg: DictConfig, path: Path, key: str) -> None:
    """Raise a `UserError` naming the settings of the network that differ from a weight file's, dropout rates aside.

    Not all of them show in the tensors: `sigma_data` does not.
    """
    ours, theirs = dict(leaves("net", parts.plain(cfg.net))), dict(leaves("net", files.describe(path)["net"]))
    both = [name for name in ours if name in theirs and not name.endswith(".dropout")]
    differing = [f"{name}: {theirs[name]} in the file, {ours[name]} here" for name in both if ours[name] != theirs[name]]
    require(
        not differing,
        key,
        path,
        f"these weights belong to another network; {'; '.join(differing)}; net=teacher takes the teacher's",
    )


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries under their dotted names."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from leaves(f"{name}.{key}", item)


def sources(cfg: DictConfig, kinds: Iterable[str]) -> dict[str, Pairs]:
    """Every kind of pair that the coupling asks for, its store generated first where it is missing."""
    images = resident(parts.data_source(cfg).split("train"), parts.device(cfg))

    def source(kind: str) -> Pairs:
        if kind in STORED:
            store = pairs.ensure(cfg, kind)
            tracking.stored(cfg, store.folder)
            return replace(store, images=images)
        if kind == "online":
            return online.open_online(cfg)
        return from_data(cfg, kind, images, Augmentation(cfg.training.flips, cfg.training.augment))

    return {kind: source(kind) for kind in kinds}


def from_data(cfg: DictConfig, kind: str, images: SampleSet, augmentation: Augmentation = UNCHANGED) -> IndependentPairs:
    """Images with fresh noise, of one of the kinds STOCHASTIC."""
    if kind == "minibatch_ot":
        return MinibatchOTPairs(images, cfg.seed, augmentation, by_class=parts.net_classes(cfg) > 0)
    return IndependentPairs(images, cfg.seed, augmentation)


def steps(cfg: DictConfig) -> int:
    """Training steps that see `training.total_kimg` thousand samples."""
    return round(cfg.training.total_kimg * 1000 / cfg.training.batch_size)


def fit(cfg: DictConfig, made: Artifact) -> None:
    """Run the training and write the weights; raises `KeyboardInterrupt`, with everything saved, when it was interrupted."""
    network = start(cfg)
    if distil.is_asked(cfg):
        parallel.shared(partial(distil.aligned, cfg, network, origin(cfg), made.folder))
    ema = EMA(cfg.training.ema_halflives_mimg, cfg.training.ema_sigma_rels)
    total = steps(cfg)
    with Loggers(cfg, made.folder) as loggers:
        seconds = optimise(cfg, made.folder, network, ema, total, loggers=loggers) if total else 0.0
        parallel.shared(partial(write, cfg, made, network, ema, seconds))
        loggers.trained()  # an upload may take minutes, and be interrupted: what was trained is safe by now


def write(cfg: DictConfig, made: Artifact, network: nn.Module, ema: EMA, seconds: float) -> None:
    """What is left of a training, its weights and its cost, and the done-mark."""
    folder = made.folder
    kimg = steps(cfg) * cfg.training.batch_size / 1000
    used = {"kimg": kimg, "seconds": seconds, "device": parts.device_name(cfg)}
    write_json(folder / "cost.json", used | ({"devices": num} if (num := parts.num_processes(cfg)) > 1 else {}))
    write_weights(cfg, folder, network, ema)
    (folder / "last.ckpt").unlink(missing_ok=True)
    made.finish()


def cost(folder: Path) -> dict[str, Any]:
    """What a finished run cost: kimg seen, seconds over all its resumes, the device; None each where an older version made it."""
    path = folder / "cost.json"
    return read_json(path) if path.exists() else dict.fromkeys(("kimg", "seconds", "device"))


def optimise(
    cfg: DictConfig,
    folder: Path,
    network: nn.Module,
    ema: EMA,
    total: int,
    *more: L.Callback,
    loggers: Callable[[], list[Logger]] = list,
) -> float:
    """`total` steps on the network, with everything that acts on or watches them; `more` is called first. The seconds it took.

    `loggers`, opened once the pairs are there, are told what the JSON lines are.
    """
    options, mixture = cfg.training, instantiate(cfg.lrn.coupling)
    own, first = parallel.own_rows(options.batch_size), parallel.is_first()
    coupling, heldout = mixture.open(sources(cfg, mixture.weights), options.batch_size, cfg.seed, options.num_heldout, own)
    device = parts.device(cfg).type
    objective = objective_of(cfg, network)
    counts = shares(mixture.weights, options.batch_size)
    if first:
        announce(cfg, mixture, objective, counts)
    velocity = prepared(network, cfg)
    names = ("batch_size", "lr", "betas", "warmup_kimg", "gradient_clip", "label_dropout")
    drawn = Prefetched(coupling) if device == "cuda" else coupling
    module = FlowModule(velocity, objective, drawn, seed=cfg.seed, first_row=own.start, **{name: options[name] for name in names})
    checkpoint, lines = folder / "last.ckpt", JSONLines(folder / "metrics.jsonl")
    resume = parallel.shared(partial(cut_back, lines, checkpoint))
    checkpoints, clock = Checkpoints(checkpoint, cfg.trainer.checkpoint_every_s), Clock()
    watching = [*snapshots(cfg, folder, network, ema), Mix(counts), *watchers(cfg, folder, heldout)] if first else []
    trainer = quiet_trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        max_steps=total,
        logger=[lines, *loggers()] if first else False,
        callbacks=[
            *more,
            *([objective.adversary] if isinstance(objective, FineTuning) else []),
            clock,
            instantiate(cfg.lrn.dropout),
            ema,
            *watching,
            Report(cfg.name or folder.name, cfg.trainer.log_every_kimg),
            checkpoints,
        ],  # the last holds what the others did
        plugins=[DurableCheckpoints(), parallel.environment(parts.num_processes(cfg))],
        default_root_dir=folder,
        **devices(cfg),
    )
    trainer.fit(module, Steps(), ckpt_path=checkpoint if resume else None, weights_only=True)
    if trainer.global_step < total or checkpoints.interrupted:  # perhaps in the last step of all: a study must not go on
        if first:
            print(f"stopped at step {trainer.global_step} of {total}, saved; the same command goes on")
        raise KeyboardInterrupt
    return clock.seconds


def objective_of(cfg: DictConfig, network: nn.Module) -> Objective | Distillation:
    """What the network's training minimises: the loss, in adversarial fine-tuning with a discriminator of this network."""
    objective = loss(cfg)
    if isinstance(objective, Distillation) and distil.is_adversarial(cfg):
        return distil.fine_tuning(cfg, objective, network)
    return objective


def loss(cfg: DictConfig) -> Objective | Distillation:
    """The loss of the three parts of `dyn`, or a flow map's; a learned weight starts from the run's seed, as the network does."""
    if distil.is_asked(cfg):
        return distil.objective(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        # one by one: instantiated together, OmegaConf would take the dataclasses among them for configurations
        return Objective(instantiate(cfg.dyn.time), instantiate(cfg.dyn.metric), instantiate(cfg.dyn.weight))


def devices(cfg: DictConfig) -> dict[str, Any]:
    """Lightning's settings for one device, or for as many processes as train together, already connected, by DDP.

    A static graph: a network may have weights that a run never uses, as that of an augmentation which is off. Buffers are
    constants, the same everywhere.
    """
    if parts.num_processes(cfg) == 1:
        return {"devices": 1}
    strategy = DDPStrategy(static_graph=True, broadcast_buffers=False, gradient_as_bucket_view=True)
    return {"devices": parts.num_devices(cfg), "num_nodes": cfg.trainer.num_nodes, "strategy": strategy}


def cut_back(lines: JSONLines, checkpoint: Path) -> bool:
    """Whether there is a checkpoint to go on from; the lines after it are dropped."""
    found = checkpoint.exists()
    lines.cut_back(checkpoint_step(checkpoint) if found else 0)
    return found


def snapshots(cfg: DictConfig, folder: Path, network: nn.Module, ema: EMA) -> list[L.Callback]:
    """What stores the power-function averages on the way, if asked."""
    options = cfg.training
    if options.snapshot_every_kimg is None:
        return []
    how = {"sigma_rels": parts.plain(options.ema_sigma_rels), "every_kimg": options.snapshot_every_kimg}
    about = description(cfg) | {"run": folder.name}
    return [Snapshots(ema, network, folder / "snapshots", about, **how)]


def announce(cfg: DictConfig, mixture: Mixture, objective: Objective | Distillation, counts: Mapping[str, int]) -> None:
    """Say how many pairs of each kind a batch holds, and what is allowed but perhaps not meant."""
    if mixture.stochastic and not objective.theory_preserving:
        kinds = " and ".join(mixture.stochastic)
        warnings.warn(f"{BIASED} {kinds} pairs; see dyn/weight=learned_normalisation", stacklevel=1)
    print(f"pairs in a batch of {sum(counts.values())}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
    advise(instantiate(cfg.inf.solver), description(cfg))
    if distil.is_asked(cfg):
        distil.announce(cfg, steps(cfg))


def watchers(cfg: DictConfig, folder: Path, heldout: Coupling) -> list[L.Callback]:
    """What looks on while the flow trains: losses by time (DYN), overfitting, few-step samples (INF).

    It measures the weights of the moment, which all processes have, in one of them: no part of it waits for the others.
    """
    options, mixture = cfg.trainer, instantiate(cfg.lrn.coupling)
    sampling = {"solver": instantiate(cfg.inf.solver), "grid": instantiate(cfg.inf.grid), "nfe": cfg.nfe, "t_max": cfg.t_max}
    counts, paired = shares(mixture.weights, cfg.training.num_heldout), not mixture.stochastic
    distils = distil.is_asked(cfg)
    return [
        ByJump(heldout, options.diagnostics_every_kimg) if distils else ByTime(heldout, options.diagnostics_every_kimg, counts),
        *([] if distils else overfitting(cfg, list(mixture.weights))),
        FewStep(
            heldout,
            **sampling,
            every_kimg=options.few_step_every_kimg,
            paired=paired,
            picture_path=folder / "few_step.png",
            decode=decoder(parts.data_source(cfg)),
        ),
    ]


def overfitting(cfg: DictConfig, kinds: Sequence[str]) -> list[L.Callback]:
    """The overfitting check of a base flow, whose pairs all come from data; none where no images are held out.

    A ReFlow has pairs held out, which `ByTime` looks at.
    """
    if not set(kinds) <= {*STOCHASTIC}:
        return []
    splits = [parts.data_source(cfg).split(name) for name in ("train", "floor")]
    if not all(map(len, splits)):
        return []
    train, heldout = (from_data(cfg, "independent", split) for split in splits)
    return [Overfitting(train, heldout, cfg.trainer.diagnostics_every_kimg)]


def prepared(network: nn.Module, cfg: DictConfig) -> InPrecision:
    """The network in its precision and memory format, compiled if asked; its parameters' names stay as they are."""
    if cfg.training.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cfg.training.compile:
        network.compile(options=EAGER_MASKS if distil.is_asked(cfg) else None)  # its derivative drops the same units
    return InPrecision(network, cfg.precision).train()


def quiet_trainer(**settings: Any) -> L.Trainer:
    """A Lightning trainer that leaves bars, checkpoints and advice to us."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # which torch's forward mode calls itself
    return L.Trainer(
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **settings,
    )


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint; a damaged file is a user's error that names it."""
    try:
        return int(torch.load(path, weights_only=True, mmap=True)["global_step"])
    except Exception as error:
        raise UserError(f"{path}: damaged checkpoint ({str(error)[:60]}); delete it to train this run again") from None


def write_weights(cfg: DictConfig, folder: Path, network: nn.Module, ema: EMA) -> None:
    """Every profile as safetensors under weights/: the raw weights first, each average after them."""
    about = description(cfg)
    (folder / "weights").mkdir(exist_ok=True)
    network.to("cpu")
    files.save(network, folder / "weights" / "raw.safetensors", {**about, "profile": "raw"})
    for name in ema.averages:
        ema.copy_to(name, network)
        files.save(network, folder / "weights" / f"{name}.safetensors", {**about, "profile": name})


def description(cfg: DictConfig) -> dict[str, Any]:
    """What a run's weight files say of themselves, by which they can be a teacher."""
    return {
        "net": parts.plain(cfg.net),
        "shape": list(parts.sample_shape(parts.data_source(cfg))),
        "num_classes": parts.net_classes(cfg),
        "t_max": cfg.t_max,
        "kimg": cfg.training.total_kimg,
        "label_dropout": cfg.training.label_dropout,
        **(distil.description(cfg) if distil.is_asked(cfg) else {}),
        **latents(parts.data_source(cfg)),
    }


def latents(source: DataSource) -> dict[str, Any]:
    """How a flow's samples are decoded, where they are latents."""
    return {"latents": source.codec.about} if isinstance(source, Encoded) else {}
