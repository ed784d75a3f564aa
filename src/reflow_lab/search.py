"""The verb `search`: settings of training searched by Optuna's TPE (Bergstra et al. 2011), each trial trained and measured.

A trial is a training run and its evaluations, all of them artifacts: the same search again proposes the same trials and reads
back what is finished. What is chosen on one training seed and noise is trained and measured on another before it is reported.
"""

import copy
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from . import hydra_errors, jobs, parts, tracking
from .artifacts import Artifact, DiskFull, artifact, read_json, write_atomically, write_json
from .errors import UserError, require
from .evaluation import evaluate, targets
from .evaluation.features import identity
from .evaluation.intervals import difference
from .evaluation.values import plus_minus, primary
from .networks import files
from .studies.request import key, merged
from .studies.table import header
from .training import train

VERSION = 1  #: of the recipe: increment when the same configuration means another result
Value = float | str | bool
Cell = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """What is searched of one key: numbers in [low, high], by `log` or in steps, or `choices`.

    `complement` names another key, which gets 1 minus the number.
    """

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: Sequence[Value] | None = None
    complement: str | None = None

    def __post_init__(self) -> None:
        bounded = self.low is not None and self.high is not None and self.low < self.high
        fits = bool(self.choices) if self.low is None and self.high is None else bounded and self.choices is None
        require(fits, f"{self.key}: low, high, choices", (self.low, self.high, self.choices), "must be low < high, or choices")
        positive = not self.log or (self.low is not None and self.low > 0 and self.step is None)
        require(positive, f"{self.key}: log", self.log, "wants a positive low, and no step")
        require(self.step is None or self.step > 0, f"{self.key}: step", self.step, "must be positive")
        require(self.complement is None or bounded, f"{self.key}: complement", self.complement, "is for numbers")

    def suggest(self, trial: Any, name: str) -> Value:
        """Optuna's next value, to three digits, as it is written on the command line."""
        if self.choices is not None:
            return trial.suggest_categorical(name, list(self.choices))
        found = trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)
        return float(f"{found:.3g}")

    def has(self, value: Any) -> bool:
        """Whether a value is among those searched."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None and self.high is not None
        if not parts.is_number(value) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    @property
    def example(self) -> Value:
        """One of the values."""
        return self.choices[0] if self.choices is not None else float(self.high or 0)

    def overrides(self, value: Value) -> list[str]:
        """The value as words of the command line."""
        other = [f"{self.complement}={1 - float(value):.3g}"] if self.complement else []
        return [f"{self.key}={value:g}" if isinstance(value, float) else f"{self.key}={value}", *other]


@dataclass(frozen=True)
class Settings:
    """What is searched, how long, on which seeds; `samplers` are overrides with all of which a trial is measured."""

    num_trials: int
    seed: int
    training_seed: int
    noise_seed: int
    space: Mapping[str, Mapping[str, Any]]
    samplers: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, low in {"num_trials": 1, "seed": 0, "training_seed": 0, "noise_seed": 0}.items():
            parts.require_whole(f"hparams_search.{name}", getattr(self, name), low)
        require(bool(self.space), "hparams_search.space", dict(self.space), "must have at least one parameter")
        require(
            all(key(word).startswith("inf") for words in self.samplers for word in words.split()),
            "hparams_search.samplers",
            list(self.samplers),
            "must be overrides of inf",
        )
        assert self.parameters

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters by their short names."""
        return {name: Parameter(**about) for name, about in self.space.items()}

    def words(self, values: Mapping[str, Value]) -> list[str]:
        """A trial's values as words of the command line."""
        return [word for name, parameter in self.parameters.items() for word in parameter.overrides(values[name])]


class Measured(NamedTuple):
    """A run measured with the sampler that suits it best."""

    run: Path
    sampler: "Sampler"
    cell: Cell

    @property
    def name(self) -> str:
        """Of the primary metric."""
        return primary(self.cell["distance"], self.cell["intervals"])

    @property
    def value(self) -> float:
        """The primary metric."""
        return float(self.cell[self.name])


@dataclass(frozen=True)
class Trial:
    """One trial: its overrides, sampler included, and its value, or why it has none."""

    values: dict[str, Value]
    overrides: list[str]
    sampler: list[str]
    value: float | None
    run: str | None
    error: str | None


class Setup(NamedTuple):
    """What trials, or the runs reported, have in common: the words given, the training seed and the noise."""

    given: list[str]
    seed: int
    noise: int

    def composed(self, words: Sequence[str] = ()) -> DictConfig:
        """The configuration of a run with these words instead of those given on the same keys."""
        return self.seeded(hydra.compose("train", merged(self.given, words)))

    def seeded(self, cfg: DictConfig) -> DictConfig:
        """A copy of a configuration with this seed and noise."""
        changed = copy.deepcopy(cfg)
        changed.seed, changed.evaluation.seed = self.seed, self.noise
        return changed


class Sampler(NamedTuple):
    """A sampler to measure with: its words, and what they make of `inf`; None leaves the run's own."""

    words: list[str]
    inf: DictConfig | None


def search(cfg: DictConfig) -> dict[str, Any]:
    """Search, or read the finished search; prints its table and the overrides to copy, and returns what table.json holds."""
    node = OmegaConf.select(cfg, "hparams_search")
    require(node is not None, "hparams_search", "null", "choose what to search, e.g. hparams_search=quickstart")
    settings: Settings = instantiate(node)
    given = own_words(HydraConfig.get().overrides.task)
    tuning = Setup(given, settings.training_seed, settings.noise_seed)
    fresh = Setup(given, cfg.seed, cfg.evaluation.seed)
    base, samplers = check(settings, tuning, fresh)
    made = plan(settings, base, fresh)
    with made.locked():
        if not made.is_done():
            made.begin()
            with tracking.making(study=f"search {made.key}"):
                trials = run(settings, tuning, samplers, configured(cfg, settings))
                found = report(trials, fresh, samplers)
            write_json(made.folder / "table.json", found)
            write_atomically(made.folder / "table.md", lambda path: path.write_text(markdown(found, settings, fresh)))
            made.finish()
    print((made.folder / "table.md").read_text())
    print(f"written: {made.folder}/table.md, table.json")
    return dict(read_json(made.folder / "table.json"))


def own_words(words: Sequence[str]) -> list[str]:
    """What the command line says of the runs, not of the search."""
    return [word for word in words if key(word).partition(".")[0] not in ("hparams_search", "launcher", "seed", "name")]


def check(settings: Settings, tuning: Setup, fresh: Setup) -> tuple[DictConfig, list[Sampler]]:
    """The configuration that trials start from and the samplers to measure with.

    Raises a `UserError` where trials and report share a seed, the configuration as it is could not be trained and measured, or
    a key that is searched is missing from it.
    """
    apart = "must differ: what is reported is not what was searched on"
    require(tuning.seed != fresh.seed, "hparams_search.training_seed", tuning.seed, f"{apart} (seed)")
    require(tuning.noise != fresh.noise, "hparams_search.noise_seed", tuning.noise, f"{apart} (evaluation.seed)")
    base = tuning.composed()
    one = "a search measures one set of samples"
    require(base.evaluation.num_seeds == 1, "evaluation.num_seeds", base.evaluation.num_seeds, one)
    samplers = [Sampler(words.split(), tuning.composed(words.split()).inf) for words in settings.samplers] or [Sampler([], None)]
    tuning.composed([word for parameter in settings.parameters.values() for word in parameter.overrides(parameter.example)])
    for setup in (tuning, fresh):
        train.plan(setup.seeded(base))
        for sampler in samplers:
            evaluate.check(with_sampler(setup.seeded(base), sampler))
    return base, samplers


def with_sampler(cfg: DictConfig, sampler: Sampler) -> DictConfig:
    """The configuration with another sampler."""
    changed = copy.deepcopy(cfg)
    changed.inf = changed.inf if sampler.inf is None else sampler.inf
    return changed


def configured(cfg: DictConfig, settings: Settings) -> dict[str, Value] | None:
    """The values that the configuration has, the first trial; None where some lie outside of what is searched."""
    choices, parameters = HydraConfig.get().runtime.choices, settings.parameters
    values: dict[str, Any] = {
        name: choices.get(p.key) if "/" in p.key else OmegaConf.select(cfg, p.key) for name, p in parameters.items()
    }
    return values if all(p.has(values[name]) for name, p in parameters.items()) else None


def plan(settings: Settings, base: DictConfig, fresh: Setup) -> Artifact:
    """The artifact of a search: what its trials start from, what is searched, how it is measured."""
    evaluation = {name: value for name, value in parts.plain(base.evaluation).items() if name != "reference"}
    about = {
        "settings": asdict(settings),
        "training": train.plan(copy.deepcopy(base)).recipe,
        "measured": [evaluate.VERSION, evaluation, identity(targets.feature_network(base)), targets.about_reference(base)],
        "reported": [fresh.seed, fresh.noise],
        "nfe": base.nfe,
        "inf": parts.plain(base.inf),
        "teacher": None if base.teacher.path is None else targets.teacher_samples_plan(base).key,
        "optuna": importlib.metadata.version("optuna"),
    }
    return artifact(base.outputs, "search", VERSION, **about)


def run(settings: Settings, tuning: Setup, samplers: Sequence[Sampler], first: dict[str, Value] | None) -> list[Trial]:
    """The trials, in order; the same seed and values give the same ones. One that raises is marked, and the search goes on."""
    import optuna  # here: it takes half a second to import, and only a search wants it

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    if first is not None:
        study.enqueue_trial(first)
    trials: list[Trial] = []
    for number in range(1, settings.num_trials + 1):
        asked = study.ask()
        values = {name: parameter.suggest(asked, name) for name, parameter in settings.parameters.items()}
        trial = tried(values, settings.words(values), tuning, samplers, f"trial {number}")
        study.tell(asked, trial.value, None if trial.error is None else optuna.trial.TrialState.FAIL)
        trials.append(trial)
        print(f"trial {number} of {settings.num_trials}: {' '.join(trial.overrides)}: {trial.error or f'{trial.value:.4g}'}")
    return trials


def tried(values: dict[str, Value], words: list[str], tuning: Setup, samplers: Sequence[Sampler], name: str) -> Trial:
    """Train and measure one trial."""
    try:
        found = measured(tuning, words, samplers, name)
    except DiskFull:
        raise
    except Exception as error:
        return Trial(values, words, [], None, None, reason(error))
    return Trial(values, words, found.sampler.words, found.value, str(found.run), None)


def reason(error: Exception) -> str:
    """Why a trial failed, in one line; a bug's traceback is printed."""
    return hydra_errors.explain(error, "train") or str(jobs.crashed(error))


def measured(setup: Setup, words: Sequence[str], samplers: Sequence[Sampler], name: str) -> Measured:
    """Train a run and measure it with each sampler: the best one. What is finished is read back."""
    cfg = setup.composed(words)
    cfg.name = name
    folder = train.train(copy.deepcopy(cfg))
    found = parts.described(files.find(folder), parts.data_source(cfg), "run")
    cells = []
    for sampler in samplers:
        settled = evaluate.settled(with_sampler(cfg, sampler), found)
        is_new = not evaluate.plan(settled, found).is_done()
        cells.append(Measured(folder, sampler, evaluate.measured(settled, found)))
        if is_new:
            tracking.evaluated(settled, folder, [cells[-1].cell])
    return min(cells, key=lambda cell: cell.value)


def best(trials: Sequence[Trial]) -> Trial:
    """The first of the trials with the smallest value."""
    finished = [trial for trial in trials if trial.value is not None]
    if not finished:
        raise UserError(f"every trial failed; the first: {trials[0].error}")
    return min(finished, key=lambda trial: trial.value or 0)


def report(trials: Sequence[Trial], fresh: Setup, samplers: Sequence[Sampler]) -> dict[str, Any]:
    """The best trial and the configuration as it was, both trained with a seed and measured on noise that no trial had."""
    found = best(trials)
    chosen = [sampler for sampler in samplers if sampler.words == found.sampler]
    after = measured(fresh, found.overrides, chosen, "best of the search")
    before = measured(fresh, [], [Sampler([], None)], "as configured")
    return {
        "metric": after.name,
        "nfe": after.cell["protocol"]["nfe"],
        "num_images": after.cell["num_images"],
        "trials": [asdict(trial) for trial in trials],
        "best": trials.index(found),
        "overrides": " ".join([*found.overrides, *found.sampler]),
        "after": reported(after),
        "before": reported(before),
        "difference": compared(after, before),
    }


def reported(found: Measured) -> dict[str, Any]:
    """A value with its 95 % interval over the noise."""
    low, high = found.cell["intervals"][found.name]
    return {"run": str(found.run), "value": found.value, "low": low, "high": high}


def compared(after: Measured, before: Measured) -> dict[str, float]:
    """How much lower the metric became, on shared noise, with its interval."""
    resamples = [torch.tensor(read_json(Path(m.cell["folder"]) / "resamples.json")[m.name]) for m in (after, before)]
    found = difference(after.value, resamples[0], before.value, resamples[1])
    return {"value": found.value, "low": found.low, "high": found.high}


def markdown(found: Mapping[str, Any], settings: Settings, fresh: Setup) -> str:
    """The page: what was found, the line to copy, all trials from the best to the worst."""
    metric, names = found["metric"], list(settings.parameters)
    lines = [f"# {metric} at {found['nfe']} NFE, {len(found['trials'])} trials", ""]
    how = f"training seed {fresh.seed} and noise {fresh.noise}, neither of which a trial had"
    lines += [
        f"Lower is better; N = {found['num_images']:,}; ± half of the 95 % interval over the noise. Reported with {how}.",
        "",
    ]
    lines += header([metric])
    titles = {"as configured": "before", f"the best, trial {found['best'] + 1}": "after", "difference": "difference"}
    shown = {title: found[part] for title, part in titles.items()}
    lines += [f"| {title} | {plus_minus(part['value'], (part['high'] - part['low']) / 2)} |" for title, part in shown.items()]
    lines += ["", "The settings of the best:", "", f"    {found['overrides']}", ""]
    tuned = f"training seed {settings.training_seed}, noise {settings.noise_seed}, TPE with seed {settings.seed}"
    lines += [f"## Trials, the best first ({tuned})", "", *header([*names, "sampler", metric])]
    order = sorted(enumerate(found["trials"]), key=lambda item: math.inf if item[1]["value"] is None else item[1]["value"])
    return "\n".join([*lines, *(row(number, trial, names) for number, trial in order), ""])


def row(number: int, trial: Mapping[str, Any], names: Sequence[str]) -> str:
    """A trial as a row."""
    value = trial["error"] if trial["value"] is None else f"{trial['value']:.4g}"
    values = [f"{v:g}" if isinstance(v := trial["values"][name], float) else str(v) for name in names]
    return "| " + " | ".join([str(number + 1), *values, " ".join(trial["sampler"]), value]) + " |"
