"""The verb `study`: every row of a table trained and evaluated, what is shared made once, the table at the end.

A study is a sweep (src/hydra_plugins/reflow_lab_study_sweeper.py): a job for each row and training seed, handed to whichever
Hydra launcher is chosen. Jobs that need the same run or pairs wait for whichever makes them; a job that fails stops no other.
"""

import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import hydra_errors, parts, tracking
from ..artifacts import write_atomically
from ..errors import JobsFailed, UserError, require
from ..evaluation import evaluate, targets
from ..inf import guidance
from ..inf.sampler import require_suited
from ..networks import files
from ..training import train
from . import estimates, results, table, traces
from .description import LINKS, Row, Study, chosen, load
from .figure import draw_samples
from .request import asked, key, merged, overruled, own_overrides, place

FAILED = ".failed"  #: in a run's folder: why its training failed last
SHARED_KEYS = ("data", "teacher", "evaluation", "precision")  #: without which numbers of two rows do not compare


class Planned(NamedTuple):
    """A row with one training seed: its configuration to train, and those to measure it at every number of steps."""

    row: Row
    seed: int
    training: DictConfig
    configs: tuple[DictConfig, ...]


class Outcome(NamedTuple):
    """How a job ended: its cells, or why there are none."""

    row: str
    seed: int
    cells: list[dict[str, Any]]
    error: str | None


def compose(study: Study, row: Row, seed: int, given: Sequence[str]) -> Planned:
    """The configurations of a row with one training seed; those that measure it are checked."""
    composed = named(row, [*merged(study.overrides, given, row.overrides), f"seed={seed}"])
    composed.name = f"{row.name} seed {seed}"
    training, *configs = (copy.deepcopy(composed) for _ in (None, *study.nfe))
    for cfg, nfe in zip(configs, study.nfe, strict=True):
        cfg.nfe = nfe
        evaluate.check(cfg)
        one = "a study measures one set of samples, whose noise its rows share; see evaluate for several"
        require(cfg.evaluation.num_seeds == 1, "evaluation.num_seeds", cfg.evaluation.num_seeds, one)
    training.nfe = study.nfe[0]
    training.pairs.seed += depth(study, row)
    taken = "is the noise of evaluation.seed, which none may train on; set another evaluation.seed"
    require(training.pairs.seed != training.evaluation.seed, f"{row.name}: pairs.seed", training.pairs.seed, taken)
    return Planned(row, seed, training, tuple(configs))


def named(row: Row, words: list[str]) -> DictConfig:
    """The configuration of these words; a mistake in the row's own is told with its name."""
    try:
        return hydra.compose("train", words)
    except Exception as error:
        line = hydra_errors.explain(error, "train", overrides=words)
        if line is None or not any(line.startswith((f"{key(word)}=", f"{key(word)}:")) for word in row.overrides):
            raise
        raise UserError(f"{row.name}: {line}") from None


def depth(study: Study, row: Row) -> int:
    """How many rows of the study have taught this one, one after the other: its pairs take noise that none of them has seen."""
    return 0 if row.teacher is None else 1 + depth(study, study.row(row.teacher))


def plan(study: Study, names: Iterable[str], seeds: Iterable[int], given: Sequence[str]) -> list[Planned]:
    """These rows with all training seeds, checked together with the rows that they need; nothing is trained yet."""
    seeds, wanted = list(seeds), needed(study, names)
    planned = {(name, seed): compose(study, study.row(name), seed, given) for name in wanted for seed in seeds}
    for found in planned.values():
        check_linked(found, {name: planned[name, found.seed] for name in sources(found.row)})
        inf = found.training.inf
        require_suited(instantiate(inf.solver), train.description(found.training), instantiate(inf.guidance))
        if found.row.guide is None:
            check_guidance(found)
    return list(planned.values())


def check_guidance(planned: Planned) -> None:
    """Raise a `UserError` for guidance that the row's own flow could not have, before it is trained."""
    guidance.check(instantiate(planned.training.inf.guidance), train.description(planned.training), "inf.guidance")


def needed(study: Study, names: Iterable[str]) -> list[str]:
    """These rows and those whose runs they use, in the study's order."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        found.add(name := pending.pop())
        links = (getattr(study.row(name), link) for link in LINKS)
        pending += [other for other in links if other is not None and other not in found]
    return [row.name for row in study.rows if row.name in found]


def sources(row: Row) -> list[str]:
    """The rows whose runs its training takes."""
    return [name for name in (row.teacher, row.start, row.weak) if name is not None]


def linked(planned: Planned, runs: Mapping[str, Path]) -> DictConfig:
    """The configuration to train, with the runs of the rows that teach it, its weak teacher, and that it starts from."""
    changed, row = copy.deepcopy(planned.training), planned.row
    if row.teacher is not None:
        changed.teacher.path, changed.teacher.profile = str(runs[row.teacher]), None
    if row.start is not None:
        changed.training.start = str(runs[row.start])
    if row.weak is not None:
        how = OmegaConf.select(changed, "flow_map.guidance.how")
        takes = how is not None and "path" in how
        require(takes, "flow_map/guidance", how and how.get("_target_"), f"{row.name}: a row with a weak teacher wants auto")
        changed.flow_map.guidance.how.path = str(runs[row.weak])
    return changed


def guided(cfg: DictConfig, weaker: Path) -> DictConfig:
    """The configuration guided away from a weaker velocity."""
    changed = copy.deepcopy(cfg)
    require("path" in changed.inf.guidance, "inf/guidance", changed.inf.guidance.get("_target_"), "a row with a guide wants auto")
    changed.inf.guidance.path = str(weaker)
    return changed


def check_linked(planned: Planned, others: Mapping[str, Planned]) -> None:
    """Raise a `UserError` if a row could not be trained from other ones, which may be untrained themselves.

    For their weights stand files of their description alone: a check reads no more. With `net=teacher` the row has that network.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{i}.safetensors" for i, name in enumerate(others)}
        for name, path in paths.items():
            files.save(nn.Identity(), path, train.description(others[name].training))
        changed = linked(planned, paths)
        try:
            train.plan(changed)
        except UserError as error:
            line = str(error)
            for name, path in paths.items():
                line = line.replace(str(path), f"the row {name}")
            raise UserError(line) from None
    planned.training.net = changed.net


def require_comparable(plans: Sequence[Planned]) -> None:
    """Raise a `UserError` unless all rows are measured alike."""
    first = measured_by(plans[0].configs[0])
    for row, _, _, (cfg, *_) in plans:
        for name, value in measured_by(cfg).items():
            differ = f"differs from {plans[0].row.name}'s: rows of one table share {', '.join(first)}"
            require(value == first[name], f"{row.name}: {name}", value, differ)


def measured_by(cfg: DictConfig) -> dict[str, Any]:
    """What must be alike for numbers of two rows to compare; the teacher's samples depend on pairs' solver, grid and nfe too."""
    shared = {name: parts.plain(cfg[name]) for name in SHARED_KEYS}
    return shared if cfg.teacher.path is None else shared | {"teacher's samples": targets.teacher_samples_plan(cfg).key}


class Job(NamedTuple):
    """A row, by its number in the study's file and by name, with a training seed."""

    number: int
    row: str
    seed: int


def jobs(cfg: DictConfig, given: Sequence[str]) -> list[Job]:
    """The rows and seeds that a study runs, all of them checked; nothing is made yet."""
    described, names, seeds, own = asked(cfg, given)
    require_comparable(plan(described, names, seeds, own))
    found = [Job(n, row.name, seed) for n, row in enumerate(described.rows) if row.name in names for seed in seeds]
    steps = len(described.nfe)
    for line in overruled(described, names, own):
        print(line, file=sys.stderr)
    print(f"{described.title}: {len(found)} runs, each measured at {steps} step counts; what is finished is read back")
    return found


def study(cfg: DictConfig) -> list[dict[str, Any]]:
    """One job of a study: train a row with one seed, and measure it; returns its cells, one a number of steps."""
    number, seed, begun = cfg.job
    described = load(cfg.study)
    plans = plan(described, [described.rows[number].name], [seed], own_overrides(HydraConfig.get().overrides.task))
    runs: dict[str, Path] = {}
    for planned in plans:
        with making(planned, described):
            runs[planned.row.name] = trained_once(planned, runs, begun)
    last = plans[-1]
    with making(last, described):
        cells = measured(last, runs)
        tracking.evaluated(last.training, runs[last.row.name], cells)
    return cells


def making(planned: Planned, study: Study) -> contextlib.AbstractContextManager[None]:
    """Let whoever tracks runs know what is made within."""
    return tracking.making(study=study.name, row=planned.row.name, experiment=experiment(planned.row, study))


def experiment(row: Row, study: Study) -> str:
    """The experiment that a row is, by the words of the study, the command line and its own."""
    words = merged(study.overrides, own_overrides(HydraConfig.get().overrides.task), row.overrides)
    return next((word.partition("=")[2] for word in words if key(word) == "experiment"), "")


def trained_once(planned: Planned, runs: dict[str, Path], begun: float) -> Path:
    """The run of a row; one whose training failed since the study began, for whichever row, is not tried again in it.

    So a guide or teacher that fails is trained by one job, and fails the others that need it at once.
    """
    note = train.plan(linked(planned, runs)).folder / FAILED
    if note.exists() and note.stat().st_mtime >= begun:
        raise UserError(f"{planned.row.name} seed {planned.seed} failed before: {note.read_text()}")
    note.unlink(missing_ok=True)
    try:
        return trained(planned, runs)
    except Exception as error:
        line = hydra_errors.explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        if note.parent.is_dir():  # else it failed before there was any work
            write_atomically(note, lambda path: path.write_text(line))
        raise


def trained(planned: Planned, runs: dict[str, Path]) -> Path:
    """The run of a row, trained if it is not there."""
    return train.train(linked(planned, runs))


def measured(planned: Planned, runs: dict[str, Path]) -> list[dict[str, Any]]:
    """The cells of a row whose run is there."""
    row, seed, training, configs = planned
    folder = runs[row.name]
    found = parts.described(files.find(folder), parts.data_source(training), "run")
    about = {"name": row.name, "overrides": list(row.overrides), "teacher": row.teacher, "seed": seed, "run": str(folder)}
    led = configs if row.guide is None else [guided(cfg, runs[row.guide]) for cfg in configs]
    settled, cost = [evaluate.settled(cfg, found) for cfg in led], train.cost(folder)
    cells = [evaluate.measured(cfg, found) for cfg in settled]
    words = [evaluate.sampler_words(cfg, cell) for cfg, cell in zip(settled, cells, strict=True)]
    return [{**about, "training": cost, "sampler": word, **cell} for word, cell in zip(words, cells, strict=True)]


def finish(cfg: DictConfig, given: Sequence[str], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Write the table of the rows whose seeds are all done, with everything beside it; returns its cells.

    Raises `JobsFailed`, which names the rows that are missing, if there are some.
    """
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    lost = {outcome.row for outcome in failed}
    names = [name for name in dict.fromkeys(outcome.row for outcome in outcomes) if name not in lost]
    cells = [cell for outcome in outcomes if outcome.row in names for cell in outcome.cells]
    if names:
        write(cfg, given, chosen(load(cfg.study), names), cells, failed)
    if failed:
        said = "; ".join(f"{outcome.row} seed {outcome.seed}: {outcome.error}" for outcome in failed)
        raise JobsFailed(f"{len(failed)} of {len(outcomes)} runs failed, and their rows are not in the table: {said}")
    return cells


def write(
    cfg: DictConfig, given: Sequence[str], shown: Study, cells: Sequence[dict[str, Any]], failed: Sequence[Outcome]
) -> None:
    """table.json, table.md, table.tex, samples.png and traces.json in `out`."""
    whole, own = load(cfg.study), own_overrides(given)
    first = [cell for cell in cells if cell["seed"] == cfg.seed]
    result = estimates.build(shown, cells, data_set(shown, own), given)
    result["failed"] = [{"name": outcome.row, "seed": outcome.seed, "error": outcome.error} for outcome in failed]
    out = results.place(place(cfg, whole, given), result)
    out.mkdir(parents=True, exist_ok=True)
    sealed = results.write(out, result)
    text = table.write(out, result)
    draw_samples(out / "samples.png", shown, first)
    runs = {cell["name"]: Path(cell["run"]) for cell in first}
    traces.write(out, {row.name: (compose(whole, row, cfg.seed, own).training, runs[row.name]) for row in shown.rows})
    tracking.study_table(cfg, out, sealed)
    print(text)
    print(f"written: {out}/table.md, table.tex, table.json, samples.png, traces.json")


def data_set(study: Study, given: Sequence[str]) -> str:
    """The data set's name, as the group `data` has it."""
    words = merged(study.overrides, given, study.rows[0].overrides)
    return str(hydra.compose("train", words, return_hydra_config=True).hydra.runtime.choices.data)
