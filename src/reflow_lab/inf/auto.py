"""Improvements 6 and 7 searched: the grid and the solver that suit one model at one number of calls (`inf=auto`).

What suits a straight flow hurts a curved one, and the papers leave kappa and r to the reader. Optuna's TPE (Bergstra et al. 2011)
tries grids, solvers and their parameters on noise that nothing is reported on; the samplers that are known come first, so that
what is found is no worse than they are on that noise.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from ..artifacts import Artifact, read_json, write_json
from ..errors import require
from ..progress import Bar
from .grids import EDM, LogitUniform, Sigmoid, Uniform
from .solvers import DPM, Euler, Heun, HeunSigma

VERSION = 1  #: of the recipe: increment when the same configuration means another result
Choice = dict[str, Any]  #: grid and solver by the names of their groups' members, and the parameter of each, as Optuna has them
Nodes = dict[str, dict[str, Any]]  #: the same as members of `inf`: `_target_` and arguments

GRIDS: dict[str, type] = {"uniform": Uniform, "edm": EDM, "sigmoid": Sigmoid, "logit_uniform": LogitUniform}
SOLVERS: dict[str, type] = {"euler": Euler, "heun": Heun, "heun_sigma": HeunSigma, "dpm": DPM}
PARAMETERS = {"sigmoid": "kappa", "edm": "rho", "dpm": "r"}  #: what is searched of a member
RANGES = {"kappa": (0.0, 30.0, 0.5), "rho": (1.0, 20.0, 0.5), "r": (0.1, 1.0, 0.05)}  #: low, high, step
KNOWN: dict[str, Choice] = {
    "native": {"grid": "edm", "rho": EDM().rho, "solver": "heun_sigma"},
    "baseline": {"grid": "uniform", "solver": "heun"},
    "improved": {"grid": "sigmoid", "kappa": Sigmoid().kappa, "solver": "dpm", "r": DPM().r},
}  #: EDM's own sampler, and the presets of `inf`


def is_asked(cfg: DictConfig) -> bool:
    """Whether the configuration leaves its sampler to a search."""
    return cfg.inf.get("search") is not None


def with_sampler(cfg: DictConfig, sampler: Nodes) -> DictConfig:
    """The configuration with this grid and solver and nothing left to search; what else `inf` says stays."""
    changed = copy.deepcopy(cfg)
    changed.inf = {key: value for key, value in cfg.inf.items() if key != "search"} | sampler
    return changed


def check(num_trials: int) -> None:
    """Raise a `UserError` where there are fewer trials than samplers that are known."""
    allowed = f"must be a whole number of at least {len(KNOWN)}: so many samplers are known beforehand"
    require(isinstance(num_trials, int) and num_trials >= len(KNOWN), "evaluation.search.num_trials", num_trials, allowed)


def nodes(choice: Choice) -> Nodes:
    """A choice as members of `inf`."""
    return {"grid": _node(GRIDS[choice["grid"]], choice), "solver": _node(SOLVERS[choice["solver"]], choice)}


def _node(member: type, choice: Choice) -> dict[str, Any]:
    names = [name for name in RANGES if name in choice and name in member.__dataclass_fields__]  # type: ignore[attr-defined]
    return {"_target_": f"{member.__module__}.{member.__name__}", **{name: choice[name] for name in names}}


def words(inf: Any) -> str:
    """A sampler for people: `DPM(r=0.4) on Sigmoid(kappa=10.0)`."""
    return f"{_words(inf['solver'])} on {_words(inf['grid'])}"


def _words(node: Any) -> str:
    given = ", ".join(f"{key}={value}" for key, value in node.items() if key != "_target_")
    name = str(node["_target_"]).rpartition(".")[2]
    return f"{name}({given})" if given else name


def overrides(choice: Choice) -> str:
    """A sampler as words of the command line."""
    own = [(group, choice[group], PARAMETERS.get(choice[group])) for group in ("grid", "solver")]
    return " ".join(f"inf/{group}={name}" + (f" inf.{group}.{key}={choice[key]}" if key else "") for group, name, key in own)


def suggest(trial: Any, t_max: float) -> Choice:
    """Optuna's next choice; grids that are spaced in sigma want a t_max below 1."""
    grids = [name for name in GRIDS if t_max < 1 or name in ("uniform", "sigmoid")]
    choice = {"grid": trial.suggest_categorical("grid", grids), "solver": trial.suggest_categorical("solver", list(SOLVERS))}
    for key in (PARAMETERS[name] for name in choice.copy().values() if name in PARAMETERS):
        low, high, step = RANGES[key]
        choice[key] = round(trial.suggest_float(key, low, high, step=step), 2)
    return choice


def search(
    value: Callable[[Nodes], float], num_trials: int, seed: int, t_max: float, title: str = "search"
) -> list[dict[str, Any]]:
    """The trials, in order: `choice`, `value` (None where it was not finite), and under `known` the name of a known sampler.

    `value` is to be small. The same seed and values give the same trials.
    """
    import optuna  # here: it takes half a second to import, and only a search wants it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    known = {name: choice for name, choice in KNOWN.items() if t_max < 1 or choice["grid"] != "edm"}
    for choice in known.values():
        study.enqueue_trial(choice)
    names: list[str | None] = [*known, *[None] * num_trials]
    trials: list[dict[str, Any]] = []

    def objective(trial: Any) -> float:
        choice = suggest(trial, t_max)
        found = value(nodes(choice))
        trials.append({"choice": choice, "value": found if math.isfinite(found) else None, "known": names[len(trials)]})
        bar.advance(1)
        return found

    with Bar(title, num_trials, "samplers") as bar:
        study.optimize(objective, n_trials=num_trials)
    return trials


def best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the trials with the smallest value."""
    finite = [trial for trial in trials if trial["value"] is not None]
    require(bool(finite), "inf", "auto", "every sampler that was tried made NaN or infinite samples")
    return min(finite, key=lambda trial: trial["value"])


def ensure(made: Artifact, open_value: Callable[[], Callable[[Nodes], float]], title: str) -> Nodes:
    """The sampler found by the search of this artifact, which is done first if it is not; says in words what was found.

    Its recipe holds `search` (num_trials, seed), `t_max` and `nfe`. `open_value` is called where there is something to search.
    """
    with made.locked():
        if not made.is_done():
            made.begin()
            begin, settings = time.monotonic(), made.recipe["search"]
            trials = search(open_value(), settings["num_trials"], settings["seed"], made.recipe["t_max"], title)
            write_json(made.folder / "search.json", {"seconds": time.monotonic() - begin, "trials": trials})
            made.finish()
    trials = read_json(made.folder / "search.json")["trials"]
    print(report(trials, made))
    return nodes(best(trials)["choice"])


def report(trials: list[dict[str, Any]], made: Artifact) -> str:
    """What was found, beside what was known, and how to say it without a search."""
    found = best(trials)
    known = ", ".join(
        f"{trial['known']} {trial['value']:.4g}" for trial in trials if trial["known"] and trial["value"] is not None
    )
    values = f"{found['value']:.4g} on the tuning noise ({known}; {len(trials)} tried)"
    return f"{words(nodes(found['choice']))} at {made.recipe['nfe']} NFE: {values}: {overrides(found['choice'])}"
