"""Weights & Biases: one run there for each training, to which its evaluations add; pair stores and studies have their own.

All that a run there holds lies on the disk first: metrics.jsonl, lineage.json and the weights in the run's folder, and in
outputs/tracking/KEY what it is called there, the pictures and the evaluations. Whoever adds to a run opens it anew: training,
its resume, an evaluation. Online the server goes on from its last step. Offline each opening is a file of its own, and of
several with one id the server keeps what was synced last: so each is given all that was logged before.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL.Image import Image

from . import parts, runs
from .artifacts import Artifact, digest, lock, read_json, write_atomically, write_json
from .errors import UserError, require
from .parallel import rank

if TYPE_CHECKING:
    import wandb  # at run time only where it is chosen: it takes a third of a second

UPLOADS = ("weights", "pairs")
FINISH_S = 600  #: how long the end of a run waits for uploads; what is left lies on the disk for `wandb sync`
SEEN = "images_seen"  #: the horizontal axis of everything that training logs
PICTURED = 64  #: samples of an evaluation that are shown


@dataclass(frozen=True)
class WandB:
    """What `logger=wandb` sets: where runs go, what they are tagged with besides their improvements, what is uploaded.

    `timeout_s` bounds the wait for the server, after which runs go on offline. `upload` lists what artifacts carry besides
    names, configurations and checksums: weights, pairs.
    """

    project: str
    entity: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    offline: bool = False
    timeout_s: float = 15
    upload: Sequence[str] = ("weights",)

    def __post_init__(self) -> None:
        require(bool(self.project), "logger.project", self.project, "must be a name")
        fits = parts.is_number(self.timeout_s) and self.timeout_s > 0
        require(fits, "logger.timeout_s", self.timeout_s, "must be a positive number of seconds")
        require(set(self.upload) <= {*UPLOADS}, "logger.upload", list(self.upload), f"must be some of {', '.join(UPLOADS)}")


@dataclass(frozen=True)
class About:
    """A run there: its id is the artifact's key, its group the study, its job type the stage."""

    id: str
    name: str
    job_type: str
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


MADE_BY = "REFLOW_LAB_MADE_BY"  #: an environment variable, so that processes which train together all know


@contextlib.contextmanager
def making(**about: str) -> Iterator[None]:
    """Say of what is trained within for what it is: `study`, which becomes the group, `row`, `experiment`."""
    before = os.environ.get(MADE_BY)
    os.environ[MADE_BY] = json.dumps(about)
    try:
        yield
    finally:
        os.environ.pop(MADE_BY)
        os.environ |= {} if before is None else {MADE_BY: before}


def made_by() -> dict[str, str]:
    """What is known of the command: what `making` said, or the verb's experiment."""
    if MADE_BY in os.environ:
        return dict(json.loads(os.environ[MADE_BY]))
    if not HydraConfig.initialized() or HydraConfig.get().job.config_name == "study":
        return {}
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    return {"experiment": experiment} if experiment else {}


def chosen(cfg: DictConfig) -> WandB | None:
    """The settings of `logger=wandb`; None for another logger or none, and in all but the first of several processes."""
    if not is_ours(cfg) or rank() > 0 or os.environ.get("WANDB_MODE") == "disabled":
        return None
    made: WandB = instantiate(cfg.logger, _convert_="all")
    return made


def is_ours(cfg: DictConfig) -> bool:
    """Whether the configured logger is `WandB`."""
    return cfg.logger is not None and cfg.logger.get("_target_") == f"{__name__}.WandB"


def kept(outputs: str | Path, key: str) -> Path:
    """The folder of what is known of a run beside its own, which its done-mark closes."""
    return Path(outputs) / "tracking" / key


# Opening a run


@contextlib.contextmanager
def opened(settings: WandB, outputs: str | Path, about: About) -> Iterator["wandb.Run"]:
    """The run, online where that is wanted and possible; its id and name are on the disk before.

    One process at a time has it: two with one id would spoil each other's.
    """
    folder = kept(outputs, about.id)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        known = {key: value for key, value in asdict(about).items() if key != "config"}
        write_json(folder / "run.json", {**known, "project": settings.project, "entity": settings.entity})
        run, status = _init(settings, outputs, about), 1
        try:
            run.define_metric(SEEN)
            run.define_metric("*", step_metric=SEEN)
            yield run
            status = 0
        finally:
            run.finish(exit_code=status)


def _init(settings: WandB, outputs: str | Path, about: About) -> "wandb.Run":
    import wandb

    def begin(mode: str) -> "wandb.Run":
        how = {"init_timeout": settings.timeout_s, "finish_timeout": FINISH_S, "silent": True, "reinit": "create_new"}
        given = {**asdict(about), "project": settings.project, "entity": settings.entity, "dir": str(outputs)}
        return wandb.init(mode=mode, resume="allow", settings=wandb.Settings(**how), **given)  # type: ignore[arg-type]

    if is_online(settings):
        try:
            return begin("online")
        except (wandb.Error, OSError) as error:
            give_up(error)
            wandb.teardown()  # otherwise its service holds that the id is in use
    try:
        return begin("offline")
    except wandb.errors.UsageError as error:
        raise UserError(f"logger: {' '.join(str(error).split())}") from None


def is_online(settings: WandB) -> bool:
    """Whether to try the server: it is wanted, W&B has a key for it, and it was there when this process last tried."""
    import wandb

    if settings.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun") or _GIVEN_UP:
        return False
    try:
        if wandb.login(prompt=False, verify=False):
            require_answer(wandb.setup().settings.base_url, settings.timeout_s)
            return True
    except (wandb.Error, OSError) as error:  # a key that can be none, or no server
        give_up(error)
        return False
    _say("W&B: no API key (`wandb login` stores one): runs are kept offline, for `wandb sync`")
    return False


def require_answer(server: str, timeout_s: float) -> None:
    """Raise an `OSError` unless a server answers, whatever it says.

    Asked before W&B's own service is: that one keeps trying what it has begun, and waits for it when the process ends.
    """
    import requests

    requests.get(f"{server}/healthz", timeout=timeout_s).close()


_GIVEN_UP: list[str] = []  #: why the server was left alone


def give_up(error: Exception) -> None:
    """Go on offline, in this process for good: a study must not wait for a dead server at every row."""
    _GIVEN_UP.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    _say(f"W&B: going on offline, for `wandb sync` ({_GIVEN_UP[-1]})")


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def where(run: "wandb.Run", outputs: str | Path) -> str:
    """Where to look at a run, for people."""
    return f"W&B: {run.url}" if not run.offline else f"W&B, offline: wandb sync {outputs}/wandb/offline-run-*-{run.id}*"


# A training


def about_training(cfg: DictConfig, folder: Path, settings: WandB) -> About:
    """The run of a training, from its configuration, or as it was called before: what two studies share stays the first one's."""
    config, by, path = parts.plain(cfg), made_by(), kept(folder.parents[1], folder.name) / "run.json"
    before = read_json(path) if path.exists() else {}
    ours = settings.group or by.get("study")
    is_others = before.get("group") not in (None, ours)
    name = before["name"] if is_others else cfg.name or by.get("row") or before.get("name") or runs.title(config)
    group = before["group"] if is_others else ours
    tags = dict.fromkeys([*before.get("tags", runs.tags(config)), *settings.tags])
    return About(folder.name, name, "train", group, [*tags], config)


def lineage(made: Artifact, start: Path | None) -> dict[str, Any]:
    """What a training makes and what it used, by the names that artifacts have; `start`: the file of the starting weights.

    It lies in the run's folder as lineage.json, whatever the logger. Who goes on with it does not become its maker.
    """
    inputs = made.recipe["inputs"]
    drawn = {kind: key if isinstance(key, str) else digest(key) for kind, key in inputs["pairs"].items()}
    stores = [_used("pairs", None if kind == "online" else f"pairs-{key}", key, drawn=kind) for kind, key in drawn.items()]
    weights = [_used("model", model_name(start), inputs["start"])] if start else []
    uses = [_used("data", None, inputs["data"]), *stores, *weights]
    path = made.folder / "lineage.json"
    maker = read_json(path)["made_by"] if path.exists() else {}
    return {"name": f"train-{made.key}", "type": "model", "uses": uses, "made_by": maker or made_by()}


def _used(kind: str, name: str | None, checksum: str, **more: str) -> dict[str, Any]:
    return {"type": kind, "name": name, "hash": checksum, **more}


def model_name(weights: Path) -> str | None:
    """The artifact that weights belong to: that of their run; None for a file of their own."""
    run = weights.parents[1] if weights.parent.name == "weights" else None
    return f"train-{run.name}" if run and (run / "recipe.json").exists() else None


def replay(run: "wandb.Run", folder: Path, batch_size: int) -> None:
    """Log what a training has on the disk, from the step on that the server has not seen: offline, from the first."""
    for step, row in history(folder).items():
        if step >= run.starting_step:
            run.log({**row, SEEN: step * batch_size}, step=step)


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, and the pictures of those steps."""
    import wandb

    rows: dict[int, dict[str, Any]] = {}
    path, pictures = folder / "metrics.jsonl", kept(folder.parents[1], folder.name) / "pictures"
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        rows.setdefault(found.pop("step"), {}).update(found)
    for file in sorted(pictures.rglob("*.png")):
        if int(file.stem) in rows:  # one of a step that a kill undid comes again
            rows[int(file.stem)][str(file.parent.relative_to(pictures))] = wandb.Image(str(file))
    return dict(sorted(rows.items()))


def keep_picture(run: "wandb.Run", outputs: str | Path, name: str, picture: Image, step: int) -> Path:
    """Write a picture of a step down, where `history` finds it again."""
    path = kept(outputs, run.id) / "pictures" / name / f"{step:09}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: picture.save(p, "png"))
    return path


def trained(run: "wandb.Run", settings: WandB, folder: Path) -> None:
    """Log a run's weights as an artifact, train-KEY, with its configuration and lineage; online, say what it used."""
    found = read_json(folder / "lineage.json")
    for name in [used["name"] for used in found["uses"] if used["name"]] if not run.offline else ():
        with contextlib.suppress(Exception):  # it was never logged there, or the server is gone: the file says it all the same
            run.use_artifact(f"{name}:latest")
    files = [folder / name for name in ("config.yaml", "recipe.json", "lineage.json", "cost.json")]
    weights = sorted((folder / "weights").glob("*.safetensors")) if "weights" in settings.upload else []
    log_files(run, found["name"], "model", folder, [*files, *weights], found)
    run.summary.update(read_json(folder / "cost.json"))


def log_files(run: "wandb.Run", name: str, kind: str, folder: Path, files: Sequence[Path], about: Mapping[str, Any]) -> None:
    """Log files of a folder as an artifact; they are not copied."""
    import wandb

    made = wandb.Artifact(name, kind, metadata={**about, "folder": str(folder)})
    for path in files:
        if path.exists():
            made.add_file(str(path), name=str(path.relative_to(folder)), policy="immutable")
    run.log_artifact(made)


# Other stages


def stored(cfg: DictConfig, folder: Path) -> None:
    """Log a finished pair store as an artifact, pairs-KEY, from a run of its own, unless that was done before.

    Its lineage, the teacher's hash or the store that it was projected from, stands in its manifest.
    """
    settings = chosen(cfg)
    if settings is None:
        return
    recipe, group = read_json(folder / "recipe.json"), settings.group or made_by().get("study")
    key = digest(recipe)
    mark = kept(cfg.outputs, key) / "logged.json"
    if mark.exists():
        return
    about = About(key, f"{recipe['kind']} pairs", "pairs", group, [*settings.tags], parts.plain(cfg))
    shards = sorted(folder.glob("shard-*.npy")) if "pairs" in settings.upload else []
    with opened(settings, cfg.outputs, about) as run:
        log_files(run, f"pairs-{key}", "pairs", folder, [folder / "manifest.json", folder / "recipe.json", *shards], recipe)
        run.summary.update({"num_pairs": recipe["count"]})
    write_json(mark, {"artifact": f"pairs-{key}"})


def evaluated(cfg: DictConfig, source: str | Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Add evaluations to the run of the training whose folder, or a weight file of which, `source` is.

    Another sampler or guidance than the one that the training names has a run of its own, of job type `evaluate`. Every metric
    becomes `METRIC/nfeN` of the summary; the distances of all evaluations so far are plotted against N. Of two with one number of
    steps the later one stays; what is there already is not told again. Weights of no run of ours are left out, and that is said.
    """
    settings, folder = chosen(cfg), run_folder(Path(source))
    if settings is None:
        return
    if folder is None:
        _say(f"W&B: {source} belongs to no training run, so its evaluation is kept on the disk alone")
        return
    training = OmegaConf.load(folder / "config.yaml")
    assert isinstance(training, DictConfig)
    about = about_sampling(cfg, training, folder, settings)
    path = kept(folder.parents[1], about.id) / "evaluations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(".evaluations.lock")):
        before = read_json(path) if path.exists() else {}
        known = before | {f"{cell['protocol']['nfe']:g}": summarised(cell) for cell in cells}
        if known != before:
            add(settings, about, training, folder, known)
            write_json(path, known)


def about_sampling(cfg: DictConfig, training: DictConfig, folder: Path, settings: WandB) -> About:
    """The run of a training, or, with another sampler than it names, one for that sampler."""
    sampler = parts.plain(cfg.inf)
    if sampler == parts.plain(training.inf):
        return about_training(training, folder, settings)
    config, by = parts.plain(training) | {"inf": sampler}, made_by()
    key = digest([folder.name, sampler])
    tags = dict.fromkeys([*runs.tags(config), *settings.tags])
    name = cfg.name or by.get("row") or f"{folder.name} {key[:4]}"
    return About(key, name, "evaluate", settings.group or by.get("study"), [*tags], config)


def add(settings: WandB, about: About, training: DictConfig, folder: Path, known: Mapping[str, Any]) -> None:
    """Open a run and put evaluations in; that of the training itself is told whole again."""
    with opened(settings, folder.parents[1], about) as run:
        if about.id == folder.name:
            replay(run, folder, training.training.batch_size)
        if (cost := folder / "cost.json").exists():
            run.summary.update(read_json(cost))
        show(run, known, images_seen(training))


def images_seen(training: DictConfig) -> int:
    """By a finished training."""
    return round(1000 * training.training.total_kimg)


def run_folder(source: Path) -> Path | None:
    """The folder of the training run that a path means, or a weight file lies in."""
    folder = source.parent.parent if source.parent.name == "weights" else source
    return folder.absolute() if (folder / "config.yaml").exists() and (folder / "recipe.json").exists() else None


def summarised(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation: its metrics, the intervals of its distances, where its samples lie."""
    names = [*cell["intervals"], *cell.get("scores", []), "straightness", "ms_per_image"]
    distance = cell["distance"]
    intervals = {name: cell["intervals"][name] for name in cell["intervals"] if name.startswith(distance)}
    return {"metrics": {name: cell[name] for name in names}, "intervals": intervals, "folder": cell["folder"]}


def show(run: "wandb.Run", known: Mapping[str, Any], seen: int) -> None:
    """Put evaluations, by number of steps, into a run: its summary, the curves of quality against steps, the samples."""
    import wandb

    summary = {f"{name}/nfe{nfe}": value for nfe, found in known.items() for name, value in found["metrics"].items()}
    logged: dict[str, Any] = {f"samples/nfe{nfe}": wandb.Image(grid) for nfe, found in known.items() if (grid := samples(found))}
    steps = sorted(known, key=float)
    for name in dict.fromkeys(name for found in known.values() for name in found["intervals"]):
        rows = [
            [float(n), known[n]["metrics"][name], *known[n]["intervals"][name]] for n in steps if name in known[n]["intervals"]
        ]
        curve = wandb.Table(columns=["nfe", name, "low", "high"], data=rows)
        logged[f"quality/{name}"] = wandb.plot.line(curve, "nfe", name, title=f"{name} by number of steps")
    run.log({**logged, SEEN: seen})
    run.summary.update(summary)


def samples(found: Mapping[str, Any]) -> Image | None:
    """The first samples of an evaluation as a grid, from the same noise each time; None for points, or where they are gone."""
    import numpy as np
    import torch

    from .inf.sample import picture

    path = Path(found["folder"]) / "samples.npy"
    images = np.load(path, allow_pickle=False)[:PICTURED] if path.exists() else np.empty(0)
    return picture(torch.from_numpy(images)) if images.ndim == 4 else None


def study_table(cfg: DictConfig, out: Path, table: Mapping[str, Any]) -> None:
    """Log a study's table, the content of its table.json, from a run of its own; one that was logged already is not again.

    Its tables are `cells`, one row for each row, seed and number of steps, `estimates` and `effects`; the files in `out` are an
    artifact; every estimate is `ROW/METRIC/nfeN` of its summary.
    """
    import wandb

    settings = chosen(cfg)
    if settings is None:
        return
    name, key, content = table["study"], digest(["study", table["study"], str(Path(out).absolute())]), digest(table)
    mark = kept(cfg.outputs, key) / "logged.json"
    if mark.exists() and read_json(mark) == content:
        return
    config = {**parts.plain(cfg), **{k: table[k] for k in ("command", "seeds", "nfe", "metric")}}
    about = About(key, name, "study", settings.group or name, list(settings.tags), config)
    with opened(settings, cfg.outputs, about) as run:
        logged: dict[str, Any] = {part: as_table(table[part]) for part in ("cells", "estimates", "effects") if table[part]}
        if (picture := Path(out) / "samples.png").exists():
            logged["samples"] = wandb.Image(str(picture))
        run.log(logged)
        run.summary.update({f"{e['name']}/{e['metric']}/nfe{e['nfe']}": e["value"] for e in table["estimates"]})
        files = [p for p in sorted(Path(out).glob("*")) if p.is_file() and not p.name.startswith(".")]
        log_files(run, f"study-{key}", "table", Path(out), files, {"study": name, "sha256": table.get("sha256")})
    write_json(mark, content)


def as_table(rows: Sequence[Mapping[str, Any]]) -> "wandb.Table":
    """Dictionaries as a table: what all of them have that is a number, a text or nothing, also under `training`."""
    import wandb

    flat = [{**row, **{f"training_{key}": value for key, value in row.get("training", {}).items()}} for row in rows]
    columns = [key for key in flat[0] if all(key in row and isinstance(row[key], str | int | float | None) for row in flat)]
    return wandb.Table(columns=list(columns), data=[[row[key] for key in columns] for row in flat], allow_mixed_types=True)
