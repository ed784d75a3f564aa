"""The verb `inspect`: a trained flow looked at more closely than by a score, as JSON, tables and pictures in a folder."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from .. import parts
from ..artifacts import Artifact, artifact, read_json, write_atomically, write_json
from ..data.sets import ImageSet, SampleSet, to_float, to_uint8
from ..data.sources import Encoded, decoded
from ..errors import require
from ..inf import auto
from ..inf.sampler import sample, sampling_times
from ..lrn.store import pair_labels, pair_noise
from ..networks import files
from ..noise import Indices, chunks
from ..parts import Teacher
from ..progress import Bar
from . import curvature, neighbours, per_class, pictures
from .cost import Cost, cost, markdown
from .features import Lite0Features
from .paired import paired_mse
from .per_class import ClassDistance, distance_of_few
from .values import Z95, plus_minus

VERSION = 1  #: of the recipe: increment when the same configuration means another result
SPACES = {"lite0": "in Lite0's features", "pixels": "in pixels"}


def inspect(cfg: DictConfig) -> Path:
    """Look at `run`, or read what was found if it is there; prints it in words and returns the folder."""
    run = parts.described(files.find(parts.require_run(cfg.run), cfg.profile), parts.data_source(cfg), "run")
    if cfg.t_max is None:
        cfg.t_max = run.t_max
    check(cfg, run)
    made = plan(cfg, run)
    with made.locked():
        if not made.is_done():
            made.begin()
            look(cfg, run, made.folder)
            made.finish()
    for name in cfg.inspect.parts:
        print("\n".join([f"{name}:", *(f"  {line}" for line in LOOKS[name].words(read_json(made.folder / f"{name}.json")))]))
    print(f"written: {made.folder}")
    return made.folder


def look(cfg: DictConfig, run: Teacher, folder: Path) -> None:
    """Write every part's files; a part that is there already, of a command that was interrupted, is kept."""
    subject = Subject(cfg, run, folder)
    for name in cfg.inspect.parts:
        if not (folder / f"{name}.json").exists():
            write_json(folder / f"{name}.json", LOOKS[name].find(subject))


def plan(cfg: DictConfig, run: Teacher) -> Artifact:
    """The artifact: weights, data, sampler and settings; the device too where the cost is measured."""
    source = parts.data_source(cfg)
    return artifact(
        cfg.outputs,
        "inspect",
        VERSION,
        weights=run.hash,
        solver=parts.plain(cfg.inf.solver),
        grid=parts.plain(cfg.inf.grid),
        guidance=parts.guidance(cfg, run).recipe,
        nfe=cfg.nfe,
        t_max=cfg.t_max,
        precision=cfg.precision,
        settings=parts.plain(cfg.inspect),
        features=Lite0Features.weight_hash,
        data={name: source.split(name).content_hash for name in ("train", "reference", "floor")},
        device=parts.device_name(cfg) if "cost" in cfg.inspect.parts else None,
    )


LOWS = {
    "seed": 0,
    "batch_size": 1,
    "resolution": 32,
    "straightness.num_images": 2,
    "straightness.num_bins": 1,
    "straightness.per_bin": 1,
    "copies.num_images": 1,
    "copies.num_shown": 1,
    "steps.num_rows": 1,
    "classes.num_images": 2,
    "classes.least": 2,
    "cost.repeats": 1,
}
LISTS = ("steps.nfe", "cost.nfe", "cost.batch_sizes")


def check(cfg: DictConfig, run: Teacher) -> None:
    """Raise a `UserError` for settings under which some part could not be done, before any of the work."""
    parts.check(cfg)
    settings = cfg.inspect
    require(
        settings.seed != cfg.pairs.seed,
        "inspect.seed",
        settings.seed,
        "must differ from pairs.seed: students have seen that noise",
    )
    wanted = parts.plain(settings.parts)
    known = isinstance(wanted, list) and bool(wanted) and all(name in LOOKS for name in wanted)
    require(known, "inspect.parts", wanted, f"must be a list of some of {', '.join(LOOKS)}")
    for key, low in LOWS.items():
        parts.require_whole(f"inspect.{key}", OmegaConf.select(settings, key), low)
    for key in LISTS:
        require_counts(f"inspect.{key}", OmegaConf.select(settings, key))
    require(len(run.description["shape"]) == 3, "run", run.path, "makes points; only flows of images can be looked at")
    latents = isinstance(parts.data_source(cfg), Encoded)
    require(not latents or "copies" not in wanted, "inspect.parts", wanted, "copies are found among images, these are latents")
    require(not auto.is_asked(cfg), "inf", "auto", "take the sampler that evaluate inf=auto found: it prints the words for it")
    for nfe in {cfg.nfe, *settings.steps.nfe, *settings.cost.nfe}:
        sampling_times(instantiate(cfg.inf.solver), instantiate(cfg.inf.grid), nfe, cfg.t_max)
    check_classes(settings.classes.only, run)
    parts.guidance(cfg, run)


def require_counts(key: str, value: Any) -> None:
    """Raise a `UserError` unless the value is a list of different whole numbers of at least 1."""
    given = parts.plain(value)
    numbers = isinstance(given, list) and bool(given) and all(isinstance(n, int) and n >= 1 for n in given)
    require(numbers and len(set(given)) == len(given), key, given, "must be a list of different whole numbers of at least 1")


def check_classes(only: Any, run: Teacher) -> None:
    """Raise a `UserError` for classes that the flow does not know."""
    given = parts.plain(only)
    if given is None or not run.num_classes:
        return
    known = isinstance(given, list) and all(isinstance(label, int) and 0 <= label < run.num_classes for label in given)
    require(known, "inspect.classes.only", given, f"must be null or a list of labels 0..{run.num_classes - 1}")


@dataclass(frozen=True)
class Subject:
    """The flow that is looked at, how it is sampled, and the folder for what is found."""

    cfg: DictConfig
    run: Teacher
    folder: Path

    @property
    def settings(self) -> DictConfig:
        """What `inspect` was told."""
        return self.cfg.inspect

    @cached_property
    def device(self) -> torch.device:
        """Where the network runs."""
        return parts.device(self.cfg)

    @cached_property
    def velocity(self) -> nn.Module:
        """The run's velocity, guided where the configuration says so."""
        return parts.velocity(self.cfg, self.run)

    def split(self, name: str) -> SampleSet:
        """A split of the data."""
        return parts.data_source(self.cfg).split(name)

    def images(self, name: str) -> ImageSet:
        """A split that holds images."""
        found = self.split(name)
        assert isinstance(found, ImageSet)
        return found

    def noise(self, indices: Indices) -> Tensor:
        """Noise of these indices, on the device."""
        return pair_noise(self.settings.seed, indices, tuple(self.run.description["shape"])).to(self.device)

    def labels(self, indices: Indices) -> Tensor | None:
        """Their labels, uniform over the classes; None for an unconditional flow."""
        return pair_labels(self.settings.seed, indices, self.run.num_classes)

    def make(self, x1: Tensor, label: Tensor | None, nfe: int) -> Tensor:
        """Samples from this noise by the configured solver and grid, on the device."""
        how = {"solver": instantiate(self.cfg.inf.solver), "grid": instantiate(self.cfg.inf.grid), "t_max": self.cfg.t_max}
        return sample(self.velocity, x1, label=None if label is None else label.to(self.device), nfe=nfe, **how)

    def draw(self, indices: Indices, label: Tensor | None, nfe: int, what: str) -> Tensor:
        """Samples as they would be saved, uint8 on the CPU, batch by batch."""
        labels = [None] * len(indices) if label is None else torch.split(label, self.settings.batch_size)
        made = []
        with Bar(what, len(indices), "images") as bar:
            for chunk, y in zip(chunks(indices, self.settings.batch_size), labels, strict=False):
                x0 = self.make(self.noise(chunk), y, nfe).cpu()
                require(bool(x0.isfinite().all()), "run", self.run.path, "made NaN or infinite samples")
                made.append(to_uint8(decoded(parts.data_source(self.cfg), x0.to(self.device))).cpu())
                bar.advance(len(chunk))
        return torch.cat(made)

    @cached_property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Lite0's features of images, (n, 1280) on the CPU, computed on the device."""
        lite0 = Lite0Features(resolution=self.settings.resolution)
        return lambda images: lite0(images.to(self.device))


def mean_and_error(values: Tensor) -> tuple[list[float], list[float]]:
    """The mean over images of (n, k) values, and its standard error."""
    return values.mean(0).tolist(), (values.std(0) / len(values) ** 0.5).tolist()


def straightness(subject: Subject) -> dict[str, Any]:
    """Deviation from the chord and acceleration by t."""
    settings, found = subject.settings.straightness, []
    how = {"num_bins": settings.num_bins, "per_bin": settings.per_bin, "t_max": subject.cfg.t_max}
    with Bar("straightness", settings.num_images, "images") as bar:
        for chunk in chunks(np.arange(settings.num_images), subject.settings.batch_size):
            label = subject.labels(chunk)
            y = None if label is None else label.to(subject.device)
            found.append(curvature.along_time(subject.velocity, subject.noise(chunk), label=y, **how))
            bar.advance(len(chunk))
    paths = curvature.joined(found)
    curves = {"deviation": mean_and_error(paths.deviation), "acceleration": mean_and_error(paths.acceleration)}
    titles = {"deviation": "squared deviation from the chord", "acceleration": "acceleration dv/dt (rms)"}
    pictures.along_time(subject.folder, paths.t.tolist(), {titles[name]: curve for name, curve in curves.items()})
    (mean,), (error,) = mean_and_error(paths.deviation.mean(1, keepdim=True))
    return {
        "num_images": settings.num_images,
        "t": paths.t.tolist(),
        **{name: {"mean": mean, "standard_error": error} for name, (mean, error) in curves.items()},
        "straightness": {"mean": mean, "standard_error": error},
    }


def words_of_straightness(found: dict[str, Any]) -> list[str]:
    """Where the paths bend."""
    t, deviation, acceleration = found["t"], found["deviation"]["mean"], found["acceleration"]["mean"]
    total, sharpest = found["straightness"], int(np.argmax(acceleration))
    ends = [sum(d for d, at in zip(deviation, t, strict=True) if low <= at < high) for low, high in ((0, 0.2), (0.8, 1))]
    low, high = (100 * end / max(sum(deviation), 1e-30) for end in ends)
    return [
        f"{plus_minus(total['mean'], Z95 * total['standard_error'])} (0: straight, at constant speed; per dimension, "
        f"{found['num_images']} paths); {low:.0f} % of it at t < 0.2, {high:.0f} % at t > 0.8",
        f"sharpest turn at t = {t[sharpest]:.3f}: dv/dt {acceleration[sharpest]:.3g}, {np.mean(acceleration):.3g} on average",
    ]


def copies(subject: Subject) -> dict[str, Any]:
    """The nearest training images of samples and of held-out images, in features and in pixels."""
    settings, train, floor = subject.settings.copies, subject.images("train"), subject.images("floor")
    indices, num = np.arange(settings.num_images), min(settings.num_images, len(floor))
    samples = subject.draw(indices, subject.labels(indices), subject.cfg.nfe, "samples")
    best = search(subject, train, to_float(torch.cat((samples, floor.images[:num].cpu()))))
    arrays = {f"{space}_{key}": getattr(found, key).numpy() for space, found in best.items() for key in ("distance", "index")}
    write_atomically(subject.folder / "copies.npz", lambda p: save_arrays(p, num_samples=np.int64(len(samples)), **arrays))
    compared = {space: compare(found.distance, len(samples)) for space, found in best.items()}
    pictures.histograms(subject.folder, {SPACES[space]: found for space, found in compared.items()})
    show_neighbours(subject, samples, {space: found.index for space, found in best.items()}, compared)
    kept = ("copies", "median", "median_held_out")
    return {
        "num_samples": len(samples),
        "num_held_out": num,
        "num_train": len(train),
        "nfe": subject.cfg.nfe,
        "spaces": {space: {key: found[key] for key in kept} for space, found in compared.items()},
    }


def search(subject: Subject, train: ImageSet, asked: Tensor) -> dict[str, neighbours.Nearest]:
    """The nearest training image of each of these images in both spaces; the device makes and compares the vectors."""
    size = subject.settings.batch_size
    best: dict[str, neighbours.Nearest] = {}
    embeds: dict[str, neighbours.Embed] = {
        "lite0": lambda x: subject.features(x).to(subject.device),
        "pixels": lambda x: neighbours.pixels(x.to(subject.device)),
    }
    queries = {space: torch.cat([embed(x) for x in torch.split(asked, size)]) for space, embed in embeds.items()}
    with Bar("training images", len(train), "images") as bar:
        for count, best in neighbours.nearest(queries, train, embeds, size):  # noqa: B007
            bar.advance(count)
    return {space: neighbours.Nearest(found.distance.cpu(), found.index.cpu()) for space, found in best.items()}


def save_arrays(path: Path, **arrays: Any) -> None:
    """An .npz under any name."""
    with path.open("wb") as file:
        np.savez(file, **arrays)


def compare(distance: Tensor, num_samples: int) -> dict[str, Any]:
    """Nearest distances of samples beside those of held-out images, of which there may be none."""
    ours, theirs = distance[:num_samples], distance[num_samples:]
    found = neighbours.copies(ours, theirs) if len(theirs) else None
    return {
        "samples": ours.tolist(),
        "held-out images": theirs.tolist() if len(theirs) else None,
        "threshold": None if found is None else found.threshold,
        "copies": None if found is None else found._asdict(),
        "median": statistics.median(ours.tolist()),
        "median_held_out": statistics.median(theirs.tolist()) if len(theirs) else None,
    }


def show_neighbours(subject: Subject, samples: Tensor, index: dict[str, Tensor], compared: dict[str, dict[str, Any]]) -> None:
    """The samples that lie nearest to a training image in features, nearest first, over their neighbours in both spaces."""
    order = torch.tensor(compared["lite0"]["samples"]).argsort()[: subject.settings.copies.num_shown]
    train, rows = subject.split("train"), {"sample": samples[order]}
    captions = {}
    for space, where in SPACES.items():
        rows[f"nearest {where}"] = to_uint8(train.take(index[space][order], "cpu")[0])
        captions[f"nearest {where}"] = [f"{compared[space]['samples'][i]:.3g}" for i in order.tolist()]
    pictures.tiles(subject.folder, "neighbours", rows, [""] * len(order), captions)


def words_of_copies(found: dict[str, Any]) -> list[str]:
    """Whether samples look copied."""
    lines = []
    for space, about in found["spaces"].items():
        line = f"{SPACES[space]} the nearest of {found['num_train']:,} training images is {about['median']:.3g} away (median"
        if about["copies"] is None:
            lines.append(f"{line}); no held-out images to compare with")
            continue
        near = about["copies"]
        share, low, high = (f"{100 * near[key]:.3g}" for key in ("share", "low", "high"))
        nearest = f"the nearest {100 * near['expected']:.2g} % of {found['num_held_out']:,} held-out images"
        verdict = "more than chance" if near["p_value"] < 0.01 else "no more than chance"
        lines.append(f"{line}; held-out images {about['median_held_out']:.3g})")
        lines.append(
            f"  {share} % of {found['num_samples']:,} samples, [{low}, {high}], are nearer than {nearest}: "
            f"{verdict} (p = {near['p_value']:.2g})"
        )
    return lines


def steps(subject: Subject) -> dict[str, Any]:
    """The same noise at several numbers of calls, as a picture."""
    settings = subject.settings.steps
    indices, made = np.arange(settings.num_rows), {}
    for nfe in settings.nfe:
        made[nfe] = subject.draw(indices, subject.labels(indices), nfe, f"{nfe} NFE")
    rows = {f"noise {i}": torch.stack([images[i] for images in made.values()]) for i in indices}
    pictures.tiles(subject.folder, "steps", rows, [f"{nfe} NFE" for nfe in made], {})
    most = max(made)
    rmse = {nfe: paired_mse(to_float(x), to_float(made[most])).mean().sqrt().item() for nfe, x in made.items() if nfe != most}
    return {"num_images": settings.num_rows, "most": most, "rmse_to_most": {str(nfe): value for nfe, value in rmse.items()}}


def words_of_steps(found: dict[str, Any]) -> list[str]:
    """How much the images still change."""
    each = ", ".join(f"{value:.3g} at {nfe} NFE" for nfe, value in found["rmse_to_most"].items())
    return [f"rmse in units of [-1, 1], {found['num_images']} images, to those at {found['most']} NFE: {each or 'no others'}"]


def classes(subject: Subject) -> dict[str, Any]:
    """The Fréchet distance of each class of a conditional flow, with its floor."""
    if not subject.run.num_classes:
        return {"skipped": "this flow is unconditional: no class can be asked for"}
    given = parts.plain(subject.settings.classes.only)
    labels = range(subject.run.num_classes) if given is None else given
    found = [class_distance(subject, label) for label in labels]
    if any(c.distance is not None for c in found):
        pictures.by_class(subject.folder, found, "fd_lite0")
    return {"classes": [c._asdict() for c in found], "summary": per_class.summary(found), "nfe": subject.cfg.nfe}


def class_distance(subject: Subject, label: int) -> ClassDistance:
    """Generated images of a class against as many real ones of the reference split, and those against the floor's."""
    settings = subject.settings.classes
    there = {name: members(subject.split(name), label, settings.num_images) for name in ("reference", "floor")}
    num, has_floor = per_class.usable(len(there["reference"]), len(there["floor"]), settings.num_images, settings.least)
    if num < settings.least:
        return ClassDistance(label, num, None, None)
    real, *other = (images(subject, name, there[name][:num]) for name in ("reference", "floor")[: 1 + has_floor])
    indices = label * settings.num_images + np.arange(num)
    made = subject.features(subject.draw(indices, torch.full((num,), label), subject.cfg.nfe, f"class {label}"))
    return ClassDistance(label, num, distance_of_few(made, real), distance_of_few(other[0], real) if other else None)


def members(samples: SampleSet, label: int, most: int) -> Indices:
    """The first images of a class in a split, which has labels."""
    assert samples.labels is not None
    return per_class.members(samples.labels, label, most)


def images(subject: Subject, split: str, indices: Indices) -> Tensor:
    """Features of real images."""
    real = subject.split(split).take(indices, "cpu")[0]
    return subject.features(decoded(parts.data_source(subject.cfg), real))


def words_of_classes(found: dict[str, Any]) -> list[str]:
    """The spread over classes."""
    if "skipped" in found:
        return [f"skipped: {found['skipped']}"]
    each, few = found["classes"], [c["label"] for c in found["classes"] if c["distance"] is None]
    nums, about = [c["num"] for c in each if c["distance"] is not None], found["summary"]
    lines = [f"too few real images, n/a: {len(few)} of {len(each)} classes ({', '.join(map(str, few[:10]))})"] if few else []
    if not about:
        return lines
    floor = f", floor {about['mean_floor']:.4g}" if "mean_floor" in about else ", no held-out images for a floor"
    span = f"{min(nums)}" if min(nums) == max(nums) else f"{min(nums)} to {max(nums)}"
    mean = f"fd_lite0 {about['mean']:.4g} on average over {len(nums)} classes of {span} images{floor}"
    worst = f"worst {about['worst']:.4g}, class {about['worst_class']:.0f}"
    return [f"{mean}; {worst}; few images bias it upwards, the floor alike", *lines]


def costs(subject: Subject) -> dict[str, Any]:
    """Time and memory by batch size and number of calls; a cell that does not fit into a GPU's memory is left out."""
    settings, known = subject.settings.cost, []
    asked = [(size, nfe) for size in settings.batch_sizes for nfe in settings.nfe]
    with Bar("cost", len(asked), "cells") as bar:
        for size, nfe in asked:
            known += cell(subject, size, nfe)
            bar.advance(1)
    device = f"{parts.device_name(subject.cfg)}, {subject.cfg.precision}"
    if subject.device.type == "cpu":
        device += f", {torch.get_num_threads()} threads"
    table = markdown(known, asked, device)
    write_atomically(subject.folder / "cost.md", lambda p: p.write_text(table))
    return {"device": device, "torch": torch.__version__, "cells": [c._asdict() for c in known], "table": table}


def cell(subject: Subject, size: int, nfe: int) -> list[Cost]:
    """One batch size at one number of calls; none if it needs more memory than the GPU has."""
    indices = np.arange(size)
    x1, labels = subject.noise(indices), subject.labels(indices)
    label, repeats = None if labels is None else labels.to(subject.device), subject.settings.cost.repeats
    try:
        return [cost(lambda: subject.make(x1, label, nfe), subject.velocity, subject.device, size, nfe, repeats)]
    except torch.cuda.OutOfMemoryError:
        return []


def words_of_costs(found: dict[str, Any]) -> list[str]:
    """The table."""
    return [line for line in found["table"].splitlines() if line]


class Look(NamedTuple):
    """A part of what `inspect` does: it finds, as JSON, and says it in words."""

    find: Callable[[Subject], dict[str, Any]]
    words: Callable[[dict[str, Any]], Sequence[str]]


LOOKS = {
    "straightness": Look(straightness, words_of_straightness),
    "copies": Look(copies, words_of_copies),
    "steps": Look(steps, words_of_steps),
    "classes": Look(classes, words_of_classes),
    "cost": Look(costs, words_of_costs),
}
