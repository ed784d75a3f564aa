"""The verb `study`: every row of a table trained and evaluated, what is shared made once, the table at the end."""

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from .. import parts
from ..errors import UserError, require
from ..evaluation import evaluate, targets
from ..networks import files
from ..paths import experiments_dirs
from ..training import train
from . import table
from .figure import draw_samples

OWN_KEYS = ("study", "rows", "seeds", "out", "seed")  #: said of the study, not of its rows
SHARED_KEYS = ("data", "teacher", "evaluation", "precision")  #: without which numbers of two rows do not compare


@dataclass(frozen=True)
class Row:
    """One row: a name, the overrides that make it, the row against which its effect is measured.

    `teacher` names an earlier row, whose run (of the same seed) makes this one's pairs and starts it: k-fold ReFlow. Without it
    the study's teacher does. All rows are measured against the study's teacher.
    """

    name: str
    overrides: tuple[str, ...]
    against: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Study:
    """A study file: rows that share overrides and are measured at the same numbers of steps."""

    title: str
    overrides: tuple[str, ...]
    nfe: tuple[int, ...]
    rows: tuple[Row, ...]


class Planned(NamedTuple):
    """A row with one training seed: its configuration to train, and those to measure it at every number of steps."""

    row: Row
    seed: int
    training: DictConfig
    configs: tuple[DictConfig, ...]


def find(name: str) -> Path:
    """The file of a study, in ./experiments or among those that ship."""
    folders = experiments_dirs()
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = sorted({str(p.relative_to(folder).with_suffix("")) for folder in folders for p in folder.rglob("*.yaml")})
    raise UserError(f"study={name}: no such study; there are {', '.join(known)}")


def read(path: Path) -> Study:
    """Read a study file; raises a `UserError` that names the file and what is wrong with it."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a study: {' '.join(str(error).split())}") from None
    _keys(path, "the file", raw, {"title", "overrides", "nfe", "rows"})
    _list(path, "rows", raw["rows"], dict)
    for row in raw["rows"]:
        _keys(path, "a row", row, {"name", "overrides"}, ("against", "teacher"))
    rows = tuple(_row(path, row) for row in raw["rows"])
    nfe = _list(path, "nfe", raw["nfe"], int)
    require(min(nfe, default=0) >= 1, f"{path}: nfe", list(nfe), "must be numbers of at least 1")
    require(bool(rows), f"{path}: rows", [], "must be at least one")
    _names(path, [row.name for row in rows], rows)
    return Study(str(raw["title"]), _list(path, "overrides", raw["overrides"], str), nfe, rows)


def _row(path: Path, raw: dict[str, Any]) -> Row:
    return Row(str(raw["name"]), _list(path, "overrides", raw["overrides"], str), raw.get("against"), raw.get("teacher"))


def _keys(path: Path, what: str, node: object, needed: set[str], optional: Iterable[str] = ()) -> None:
    given = set(node) if isinstance(node, dict) else set()
    fits = needed <= given <= needed.union(optional)
    listed = ", ".join(sorted(needed)) + "".join(f", maybe {key}" for key in optional)
    if not fits:
        raise UserError(f"{path}: not a study: {what} has the keys {sorted(map(str, given))}; it wants {listed}")


def _list(path: Path, key: str, value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{path}: not a study: {key}={value}: must be a list of {kind.__name__}")
    return tuple(value)


def _names(path: Path, names: list[str], rows: Sequence[Row]) -> None:
    require(len(set(names)) == len(names), f"{path}: rows", names, "names must differ")
    for number, row in enumerate(rows):
        others, earlier = [name for name in names if name != row.name], names[:number]
        require(row.against in (None, *others), f"{path}: {row.name}.against", row.against, f"must be one of {', '.join(others)}")
        allowed = f"must be one of the rows before it: {', '.join(earlier) or 'there are none'}"
        require(row.teacher in (None, *earlier), f"{path}: {row.name}.teacher", row.teacher, allowed)


def chosen(study: Study, names: Sequence[str] | None) -> Study:
    """The study with these of its rows, in its own order; an effect is left out where the row it is measured against is."""
    known = [row.name for row in study.rows]
    wanted = known if names is None else [names] if isinstance(names, str) else list(map(str, names))
    require(bool(wanted) and set(wanted) <= set(known), "rows", wanted, f"must be some of {', '.join(known)}")
    rows = tuple(row if row.against in wanted else replace(row, against=None) for row in study.rows if row.name in wanted)
    for row in rows:
        require(row.teacher in (None, *wanted), "rows", wanted, f"{row.name} needs the row that teaches it, {row.teacher}")
    return replace(study, rows=rows)


def merged(*groups: Sequence[str]) -> list[str]:
    """Overrides of later groups instead of those of the same key in earlier ones."""
    last = {key(override): override for group in groups for override in group}
    return list(last.values())


def key(override: str) -> str:
    """The key or group that an override is about."""
    return override.lstrip("+~").split("=")[0]


def own_overrides() -> list[str]:
    """What the command line says of all rows."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for override in given:
        if key(override) == "nfe":
            raise UserError(f"{override}: a study measures at the numbers of steps that its file lists")
    return [override for override in given if key(override) not in OWN_KEYS]


def compose(study: Study, row: Row, seed: int, given: list[str]) -> Planned:
    """The configurations of a row with one training seed; those that measure it are checked."""
    composed = hydra.compose("train", [*merged(study.overrides, given, row.overrides), f"seed={seed}"])
    composed.name = f"{row.name} seed {seed}"
    training, *configs = (copy.deepcopy(composed) for _ in (None, *study.nfe))
    for cfg, nfe in zip(configs, study.nfe, strict=True):
        cfg.nfe = nfe
        evaluate.check(cfg)
        one = "a study measures one set of samples, whose noise its rows share; see evaluate for several"
        require(cfg.evaluation.num_seeds == 1, "evaluation.num_seeds", cfg.evaluation.num_seeds, one)
    training.nfe = study.nfe[0]
    training.pairs.seed += depth(study, row)
    return Planned(row, seed, training, tuple(configs))


def depth(study: Study, row: Row) -> int:
    """How many rows of the study have taught this one, one after the other: its pairs take noise that none of them has seen."""
    teachers = {other.name: other.teacher for other in study.rows}
    number, name = 0, row.teacher
    while name is not None:
        number, name = number + 1, teachers[name]
    return number


def plan(study: Study, seeds: Iterable[int], given: list[str]) -> list[Planned]:
    """All rows with all training seeds, checked; nothing is trained yet."""
    planned = {(row.name, seed): compose(study, row, seed, given) for row in study.rows for seed in seeds}
    for found in planned.values():
        if found.row.teacher is None:
            train.plan(found.training)
        else:
            check_taught(found, planned[found.row.teacher, found.seed])
    return list(planned.values())


def taught(cfg: DictConfig, teacher: Path) -> DictConfig:
    """The configuration with another teacher."""
    changed = copy.deepcopy(cfg)
    changed.teacher.path, changed.teacher.profile = str(teacher), None
    return changed


def check_taught(planned: Planned, teacher: Planned) -> None:
    """Raise a `UserError` if a row could not be trained from another one, which may be untrained itself.

    For its weights stands a file of their description alone: a check reads no more. With `net=teacher` the row has that network.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.safetensors"
        files.save(nn.Identity(), path, train.description(teacher.training))
        changed = taught(planned.training, path)
        try:
            train.plan(changed)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"the row {teacher.row.name}")) from None
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


def study(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run what is missing, then write table.json, table.md and samples.png into `out`; returns the cells of the table."""
    require(isinstance(cfg.seeds, int) and cfg.seeds >= 1, "seeds", cfg.seeds, "must be a whole number of at least 1")
    described, given = chosen(read(find(cfg.study)), cfg.rows), own_overrides()
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    plans = plan(described, seeds, given)
    require_comparable(plans)
    steps = len(described.nfe)
    print(f"{described.title}: {len(plans)} runs, each measured at {steps} step counts; what is finished is read back")
    runs: dict[tuple[str, int], Path] = {}
    cells = [cell for planned in plans for cell in run(planned, runs)]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    print(table.write(out, described, cells))
    draw_samples(out / "samples.png", described, [cell for cell in cells if cell["seed"] == seeds[0]])
    print(f"written: {out}/table.md, table.json, samples.png")
    return cells


def run(planned: Planned, runs: dict[tuple[str, int], Path]) -> list[dict[str, Any]]:
    """Train a row and measure it at every number of steps; `runs` holds the folder of each row and seed that is done."""
    row, seed, training, configs = planned
    folder = train.train(training if row.teacher is None else taught(training, runs[row.teacher, seed]))
    runs[row.name, seed] = folder
    found = parts.described(files.find(folder), parts.data_source(training), "run")
    about = {"name": row.name, "overrides": list(row.overrides), "teacher": row.teacher, "seed": seed, "run": str(folder)}
    settled, cost = [evaluate.settled(cfg, found) for cfg in configs], train.cost(folder)
    cells = [evaluate.measured(cfg, found) for cfg in settled]
    words = [evaluate.sampler_words(cfg, cell) for cfg, cell in zip(settled, cells, strict=True)]
    return [{**about, "training": cost, "sampler": word, **cell} for word, cell in zip(words, cells, strict=True)]
