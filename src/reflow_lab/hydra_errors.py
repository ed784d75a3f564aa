"""The errors of Hydra and OmegaConf in one line: the key, its value, what is allowed."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from reflow_lab.errors import UserError
from reflow_lab.paths import conf_dir


def explain(error: BaseException, verb: str = "train", *, overrides: Sequence[str] = ()) -> str | None:
    """The user's mistake behind an error, in one line; None where it is none, but a bug that deserves its traceback."""
    match error:
        case UserError():
            return str(error)
        case InstantiationException():
            return _instantiation(error)
        case MissingConfigException():
            return _missing_member(error)
        case OverrideParseException():
            return f"{error.override}: not an override; write key=value or group=member ({_reason(error)})"
        case ConfigCompositionException():
            return _composition(error, verb, overrides)
        case ConfigKeyError() | ConfigAttributeError():
            return None  # our code asked for a key that no configuration has
        case MissingMandatoryValue():
            return f"{error.full_key}=???: a value is needed: {error.full_key}=VALUE"
        case OmegaConfBaseException():
            return f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)
        case HydraException() | yaml.YAMLError():
            return _flat(error)
    return _flat(error) if isinstance(error, ValueError) and _raised_by_hydra(error) else None


def _flat(text: object) -> str:
    return " ".join(str(text).split())


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _reason(error: OverrideParseException) -> str:
    """The parser's own words, without the echo of the line, the caret below it and the address of the manual."""
    lines = [line for line in str(error).splitlines() if "^" not in line and not line.startswith("See https")]
    return lines[-1]


def _raised_by_hydra(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("hydra.")


# Composition

LAUNCHERS = ("joblib", "submitit", "ray")  #: those that are extras of the package


def _missing_member(error: MissingConfigException) -> str:
    if error.options is None:
        return _first_line(error)
    group, _, member = (error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/launcher" and (extra := member.partition("_")[0]) in LAUNCHERS:
        return f"launcher={member}: not installed; pip install reflow_lab[{extra}]"
    near = difflib.get_close_matches(member, error.options, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={member}: no such member; {hint}available: {', '.join(error.options)}"


_COMPOSITION = {
    "unknown": re.compile(r"(?:In '(?P<file>.+?)': )?Could not override '(?P<key>.+?)'"),
    "sweep": re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(?P<override>.+?)'(?: requires|\n|$)"),
    "choose": re.compile(r"You must specify '(?P<group>.+?)'.*?options:\s*(?P<options>.*)", re.DOTALL),
    "merge": re.compile(r"Error merging override (?P<override>.+)"),
}


def _composition(error: ConfigCompositionException, verb: str, overrides: Sequence[str]) -> str | None:
    found = {kind: match for kind, pattern in _COMPOSITION.items() if (match := pattern.match(str(error)))}
    if match := found.get("unknown"):
        where = f" (in conf/{match['file']}.yaml)" if match["file"] else ""
        return _unknown_key(match["key"], verb, overrides) + where
    if match := found.get("sweep"):
        return f"{match['override']}: several values are a sweep: add -m, or write a list as key=[a,b]"
    if match := found.get("choose"):
        return f"{match['group']}=???: choose one of {', '.join(match['options'].split())}"
    if match := found.get("merge"):
        return f"{match['override']}: {_first_line(error.__cause__)}"
    if not str(error) and error.__cause__ is not None:
        return explain(error.__cause__, verb, overrides=overrides) or _flat(error.__cause__)
    return _flat(error)


def _unknown_key(key: str, verb: str, overrides: Sequence[str]) -> str:
    mistaken = [word for word in overrides if word.split("=")[0] == key]
    names = _known_names(verb, [word for word in overrides if word not in mistaken], with_hydra=key.startswith("hydra"))
    near = nearest(key, names)
    parent = _existing_parent(key, names)
    children = [name for name in names if name.startswith(parent) and "." not in name.removeprefix(parent)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(children))}"
    add = f" (+{mistaken[0]} hands a new argument to its _target_)" if mistaken and f"{parent}_target_" in names else ""
    rows = f" (++{mistaken[0].lstrip('+')} if the study's rows have it)" if mistaken and verb == "study" else ""
    return f"{mistaken[0] if mistaken else key}: no such key; {hint}{add}{rows}"


def _existing_parent(key: str, names: set[str]) -> str:
    parent = key.rpartition(".")[0]
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    return f"{parent}." if parent else ""


def nearest(key: str, names: Collection[str]) -> list[str]:
    """At most three names that a misspelt key may mean: siblings; training.lr for lr; alike as a whole, or in the last part."""
    parent, _, last = key.rpartition(".")
    if parent in names:
        siblings = {name.removeprefix(f"{parent}."): name for name in names if name.startswith(f"{parent}.")}
        return [siblings[tail] for tail in difflib.get_close_matches(last, siblings)]
    candidates = sorted(name for name in names if "/" in name or "/" not in key)
    tails = {name: re.split(r"[./]", name)[-1] for name in candidates}
    meant = difflib.get_close_matches(re.split(r"[./]", key)[-1], set(tails.values()), n=1, cutoff=0.75)
    same_tail = [name for name in candidates if tails[name] == key]
    return (
        same_tail
        or difflib.get_close_matches(key, candidates, cutoff=0.75)
        or [name for name in candidates if tails[name] in meant][:3]
    )


def _known_names(verb: str, overrides: Sequence[str], *, with_hydra: bool) -> set[str]:
    """Every key and group of the verb's configuration; the other overrides take part unless they are wrong as well."""
    with _without_hydra(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = partial(compose, config_name=verb, return_hydra_config=True)
        try:
            cfg = composed(overrides=list(overrides))
        except Exception:
            cfg = composed()
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    names = {*cfg.hydra.runtime.choices, *_names(tree)}
    return names if with_hydra else {name for name in names if not name.startswith("hydra")}


@contextlib.contextmanager
def _without_hydra() -> Iterator[None]:
    """Set the running application aside, where the mistake was made inside of one: Hydra has a single one at a time."""
    kept, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = kept


def _names(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


# Instantiation


_TARGET = re.compile(r"target '(?P<target>[\w.<>]+)'")
_FULL_KEY = re.compile(r"full_key: (?P<key>\S+)")
_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(?P<name>\w+)'")


def _instantiation(error: InstantiationException) -> str | None:
    cause = error.__cause__
    target = _group(_TARGET, error) or "?"
    key = _group(_FULL_KEY, error)
    if isinstance(cause, UserError):
        return _qualified(str(cause), target, key)
    if isinstance(cause, HydraException | OmegaConfBaseException):
        return explain(cause)
    if cause is None:
        return _flat(error)
    if "locating target" in str(error):
        return f"{_dotted(key)}_target_={target}: cannot be imported: {_flat(cause)}"
    if isinstance(cause, TypeError) and (unexpected := _UNEXPECTED.search(str(cause))):
        return f"{_dotted(key)}{unexpected['name']}: {target} has no such argument; it takes {', '.join(_parameters(target))}"
    is_users = isinstance(cause, TypeError | ValueError) or type(cause).__name__ == "MisconfigurationException"
    return f"{key or target}: {target} does not accept its arguments: {_flat(cause)}" if is_users else None


def _group(pattern: re.Pattern[str], error: object) -> str:
    match = pattern.search(str(error))
    return match[1] if match else ""


def _dotted(key: str) -> str:
    return f"{key}." if key else ""


def _parameters(target: str) -> list[str]:
    names = list(inspect.signature(get_object(target)).parameters)
    return names or ["none"]


def _qualified(message: str, target: str, key: str) -> str:
    """A constructor knows its argument as `r`; the user writes inf.solver.r."""
    name = message.split("=")[0]
    return f"{_dotted(key)}{message}" if name in _parameters(target) else message
