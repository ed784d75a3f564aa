"""What the command line asks of a study, checked before torch is imported: a mistake is answered in a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from ..errors import UserError, require
from . import results
from .description import Study, chosen, load

OWN_KEYS = ("study", "rows", "seeds", "out", "seed", "job")  #: said of the study, not of its rows
DATA_KEYS = ("experiment", "data")  #: that say what a study is about
OWN_GROUPS = ("hydra", "launcher")  #: likewise, with all below them


class Asked(NamedTuple):
    """A study, the names of the rows that are wanted, their training seeds, and what the command line says of all rows."""

    study: Study
    names: list[str]
    seeds: range
    overrides: list[str]


def asked(cfg: DictConfig, given: Sequence[str]) -> Asked:
    """What is asked; raises a `UserError` for a mistake in it, or where `out` holds a result that was changed."""
    require(isinstance(cfg.seeds, int) and cfg.seeds >= 1, "seeds", cfg.seeds, "must be a whole number of at least 1")
    described, own = load(cfg.study), own_overrides(given)
    names = [row.name for row in chosen(described, cfg.rows).rows]
    results.require_whole(place(cfg, described, given))
    return Asked(described, names, range(cfg.seed, cfg.seed + cfg.seeds), own)


def place(cfg: DictConfig, study: Study, given: Sequence[str]) -> Path:
    """`out`; by default outputs/STUDY, with the experiment and data behind it that the command line names and the study does not.

    So tables on other data do not replace each other.
    """
    if cfg.out is not None:
        return Path(cfg.out)
    others = [word.partition("=")[2] for word in given if key(word) in DATA_KEYS and word not in study.overrides]
    return Path(cfg.outputs) / "-".join([study.name, *others])


def merged(*groups: Sequence[str]) -> list[str]:
    """Overrides of later groups instead of those of the same key in earlier ones."""
    last = {key(override): override for group in groups for override in group}
    return list(last.values())


def overruled(study: Study, names: Sequence[str], given: Sequence[str]) -> list[str]:
    """What the command line says in vain: those of these rows that set the same key to something else, a line each word."""
    own = {row.name: {key(word): word for word in row.overrides} for row in study.rows if row.name in names}

    def deaf(word: str) -> list[str]:
        return [name for name, words in own.items() if words.get(key(word), word) != word]

    return [f"{word}: not heeded by rows that set it themselves: {', '.join(deaf(word))}" for word in given if deaf(word)]


def key(override: str) -> str:
    """The key or group that an override is about."""
    return override.lstrip("+~").split("=")[0]


def own_overrides(given: Sequence[str]) -> list[str]:
    """What the command line says of all rows."""
    for override in given:
        if key(override) == "nfe":
            raise UserError(f"{override}: a study measures at the numbers of steps that its file lists")
    about = [(override, key(override)) for override in given]
    return [override for override, k in about if k not in OWN_KEYS and k.replace("/", ".").split(".")[0] not in OWN_GROUPS]
