"""The verb `study`: every row of a table trained and evaluated, what is shared made once, the table at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from .. import parts
from ..errors import UserError, require
from ..evaluation.evaluate import measured
from ..networks import files
from ..paths import experiments_dirs
from ..training.train import train
from . import table
from .figure import draw_samples

OWN_KEYS = ("study", "seeds", "out", "seed", "nfe")  #: said of the study, not of its rows


@dataclass(frozen=True)
class Row:
    """One row: a name, the overrides that make it, and the row against which its effect is measured."""

    name: str
    overrides: tuple[str, ...]
    against: str | None = None


@dataclass(frozen=True)
class Study:
    """A study file: rows that share overrides and are measured at the same numbers of steps."""

    name: str
    title: str
    overrides: tuple[str, ...]
    nfe: tuple[int, ...]
    rows: tuple[Row, ...]


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
        rows = tuple(Row(r["name"], tuple(r["overrides"]), r.get("against")) for r in raw["rows"])
        study = Study(path.stem, raw["title"], tuple(raw["overrides"]), tuple(raw["nfe"]), rows)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a study: {' '.join(str(error).split())}") from None
    names = [row.name for row in study.rows]
    require(len(set(names)) == len(names), "rows", names, f"names in {path} must differ")
    for row in study.rows:
        require(row.against in (None, *names), f"{row.name}.against", row.against, f"must be one of {', '.join(names)}")
    return study


def merged(*groups: list[str] | tuple[str, ...]) -> list[str]:
    """Overrides of later groups instead of those of the same key in earlier ones."""
    last = {override.lstrip("+~").split("=")[0]: override for group in groups for override in group}
    return list(last.values())


def own_overrides() -> list[str]:
    """What the command line says of all rows."""
    if not HydraConfig.initialized():
        return []
    return [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").split("=")[0] not in OWN_KEYS]


def compose(study: Study, row: Row, seed: int, given: list[str]) -> DictConfig:
    """The configuration of a row with one training seed."""
    overrides = merged(study.overrides, given, row.overrides)
    cfg = hydra.compose("train", [*overrides, f"seed={seed}"])
    with open_dict(cfg):
        cfg.name = f"{row.name} seed {seed}"
    return cfg


def study(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run what is missing, then write table.json, table.md and samples.png into `out`; returns the rows of the table."""
    require(isinstance(cfg.seeds, int) and cfg.seeds >= 1, "seeds", cfg.seeds, "must be an integer of at least 1")
    described = read(find(cfg.study))
    given = own_overrides()
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    plans = [(row, seed, compose(described, row, seed, given)) for row in described.rows for seed in seeds]
    for _, _, row_cfg in plans:
        parts.check(row_cfg)
    cells = [cell for row, seed, row_cfg in plans for cell in run_row(described, row, seed, row_cfg)]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    text = table.write(out, described, cells)
    draw_samples(out / "samples.png", described, [c for c in cells if c["seed"] == seeds[0]])
    print(text)
    print(f"written: {out}/table.md, table.json, samples.png")
    return cells


def run_row(study: Study, row: Row, seed: int, cfg: DictConfig) -> list[dict[str, Any]]:
    """Train a row and measure it at every number of steps."""
    folder = train(cfg)
    run = parts.described(files.find(folder), parts.data_source(cfg), "run")
    cells = []
    for nfe in study.nfe:
        cfg.nfe = nfe
        metrics = measured(cfg, run)
        cells.append({"name": row.name, "overrides": list(row.overrides), "seed": seed, "run": str(folder), **metrics})
    return cells
