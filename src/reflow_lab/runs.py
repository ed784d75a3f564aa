"""The verb `runs`: the trained flows in a folder of outputs, what is on in them and how good they are, from files alone."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .arguments import Parser
from .artifacts import lock, read_json
from .errors import UserError, bad_value, require
from .evaluation.values import primary

IMPROVEMENTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "weight": ("dyn.weight", lambda node: named(node) in ("LossNormalisation", "LearnedNormalisation")),
    "time": ("dyn.time", lambda node: named(node) == "Exponential"),
    "metric": ("dyn.metric", lambda node: named(node) == "HighPass" and node["lam_hpf"] > 0),
    "dropout": ("lrn.dropout", lambda node: node["fraction"] < 1),
    "coupling": ("lrn.coupling", lambda node: any(node.get(kind, 0) > 0 for kind in ("forward", "projected"))),
    "grid": ("inf.grid", lambda node: named(node) == "Sigmoid" and node["kappa"] > 0),
    "solver": ("inf.solver", lambda node: named(node) == "DPM"),
}  #: Simple ReFlow's seven (arXiv 2410.07815): where each is configured, and whether it is on there rather than the baseline
STAGES = {"dyn": ("weight", "time", "metric"), "lrn": ("dropout", "coupling"), "inf": ("grid", "solver")}
BASE_FLOW = ("independent", "minibatch_ot")  #: kinds of pairs that come from data alone
ANY_DATA = ("Archive", "Folder")  #: classes of data that hold whatever their path names
SORTS = ("started", "name", "what", "images")  #: or a number of steps: nfe9


def named(node: Any) -> Any:
    """The class that a node of a configuration names, without its module; a plain value as it is."""
    return node["_target_"].rpartition(".")[2] if isinstance(node, Mapping) and node.get("_target_") else node


def select(config: Mapping[str, Any], key: str) -> Any:
    """What stands under a dotted key; raises a `KeyError` where there is nothing."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping):
            raise KeyError(key)
        found = found[part]
    return found


def improvements(config: Mapping[str, Any]) -> list[str]:
    """The names of the improvements that are on in a run's configuration.

    One that is another than the baseline and than the paper's, e.g. EDM's weight, is not on. DYN's do not act in a flow map.
    """
    acting = {name: how for name, how in IMPROVEMENTS.items() if not (flow_map(config) and name in STAGES["dyn"])}
    return [name for name, (key, is_on) in acting.items() if _holds(is_on, config, key)]


def flow_map(config: Mapping[str, Any]) -> str | None:
    """What kind of flow map a run trained; None for a velocity."""
    options = config.get("flow_map") or {}
    if not options.get("objective"):
        return None
    if (options.get("adversarial") or {}).get("_target_"):
        return "adversarial flow map"
    return "consistency model" if named(options["objective"]) == "Consistency" else "flow map"


def _holds(is_on: Callable[[Mapping[str, Any]], bool], config: Mapping[str, Any], key: str) -> bool:
    try:
        return is_on(select(config, key))
    except (KeyError, TypeError):  # a user's own member, or one that is searched
        return False


def tags(config: Mapping[str, Any]) -> list[str]:
    """The improvements that are on, the stages of which all are on (dyn, lrn, inf), and the data set."""
    on = improvements(config)
    whole = [stage for stage, names in STAGES.items() if all(name in on for name in names)]
    return [*on, *whole, data_name(config)]


def data_name(config: Mapping[str, Any]) -> str:
    """The data set as the group `data` has it, e.g. two_moons; of a class that reads any archive or folder, the file's name."""
    data = config.get("data") or {}
    if named(data) in ANY_DATA and data.get("path"):
        return Path(data["path"]).stem
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(named(data))).lower()


def what(config: Mapping[str, Any]) -> str:
    """A kind of flow map, a base flow, of pairs from data alone, or a ReFlow; `untrained` where it only took over weights."""
    if not select(config, "training.total_kimg"):
        return "untrained"
    if kind := flow_map(config):
        return kind
    coupling = select(config, "lrn.coupling")
    kinds = [kind for kind, share in coupling.items() if kind != "_target_" and share]
    return "base flow" if set(kinds) <= {*BASE_FLOW} else "ReFlow"


def title(config: Mapping[str, Any]) -> str:
    """A name for a run that was given none: what it is, the improvements that are on, its seed."""
    kind, on = what(config), "+".join(improvements(config)) or "baseline"
    return f"{kind}, seed {config['seed']}" if kind == "base flow" else f"{kind} {on}, seed {config['seed']}"


@dataclass(frozen=True)
class Run:
    """A training run, as its folder tells it."""

    folder: Path
    config: dict[str, Any]
    made_by: dict[str, str]
    weights: frozenset[str]  #: hashes of its weight files, by which evaluations name them

    @property
    def state(self) -> str:
        """`done`, `unfinished at step N`, or `being trained`, when a process holds its lock."""
        if (self.folder / "done.json").exists():
            return "done"
        return "being trained" if _is_held(self.folder / ".lock") else f"unfinished at step {self.step}"

    @property
    def name(self) -> str:
        """As the study called it that began it, which another one may share; else as it was named."""
        row = self.made_by.get("row")
        return f"{row} seed {self.config['seed']}" if row else self.config.get("name") or ""

    @property
    def step(self) -> int:
        """The last step of which metrics were written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith("}")), 0)

    @property
    def images(self) -> int:
        """Images seen so far."""
        if (cost := self.folder / "cost.json").exists():
            return round(1000 * read_json(cost)["kimg"])
        if (self.folder / "done.json").exists():
            return round(1000 * select(self.config, "training.total_kimg"))
        return int(self.step * select(self.config, "training.batch_size"))

    @property
    def started(self) -> float:
        """When its training began, seconds since 1970."""
        return (self.folder / "recipe.json").stat().st_mtime

    def described(self) -> dict[str, Any]:
        """What a table and `--json` show."""
        return {
            "key": self.folder.name,
            "name": self.name,
            "what": what(self.config),
            "improvements": improvements(self.config),
            "data": data_name(self.config),
            "tags": [*dict.fromkeys([*tags(self.config), *filter(None, [self.made_by.get("experiment")])])],
            "images": self.images,
            "state": self.state,
            "started": self.started,
            "made_by": self.made_by,
            "folder": str(self.folder),
        }


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with lock(path, wait=False) as mine:
            return not mine
    except OSError:  # somebody else's folder, which we may only read
        return False


def readable(folder: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` finds in a folder; None, and a line on stderr, where it is damaged."""
    try:
        return read(folder)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OSError, yaml.YAMLError) as error:
        print(f"{folder}: left out: {type(error).__name__} {' '.join(str(error).split())[:120]}", file=sys.stderr)
        return None


def read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The run of a folder, and its description."""
    config = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    lineage, mark = folder / "lineage.json", folder / "done.json"
    made_by = read_json(lineage)["made_by"] if lineage.exists() else {}
    hashes = read_json(mark)["files"] if mark.exists() else {}
    written = frozenset(checksum[:16] for name, (_, checksum) in hashes.items() if name.startswith("weights/"))
    run = Run(folder, config, made_by, written)
    return run, run.described()


def read_cell(folder: Path) -> dict[str, Any]:
    """An evaluation: whose weights, at how many steps, by which sampler, and its distance, to the teacher where there is one."""
    found = read_json(folder / "metrics.json")
    by, distance = found["protocol"], found.get("distance", "fd_lite0")
    metric = primary(distance, found)
    return {
        "weights": by["weights"],
        "nfe": by["nfe"],
        "metric": metric,
        "value": found[metric],
        "interval": found["intervals"][metric],
        "num_images": found["num_images"],
        "solver": named(by["solver"]),
        "grid": by["grid"],
        "folder": str(folder),
    }


def marked(outputs: Path, stage: str, file: str) -> list[Path]:
    """The folders of a stage that hold a file."""
    return sorted(path.parent for path in outputs.glob(f"{stage}/*/{file}"))


def listed(outputs: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every training run in the outputs, described, with the evaluations of its weights."""
    cells = [cell for folder in marked(outputs, "evaluate", "metrics.json") if (cell := readable(folder, read_cell))]
    for folder in marked(outputs, "train", "recipe.json"):
        if found := readable(folder, read_run):
            run, described = found
            yield run, described | {"evaluations": [cell for cell in cells if cell["weights"] in run.weights]}


class Column(NamedTuple):
    """What compares within one column of the table: one distance of one number of samples (N) at one number of steps."""

    metric: str
    num_images: int
    nfe: int


def lowest(described: Mapping[str, Any]) -> dict[Column, tuple[float, int]]:
    """In each column the lowest distance, and of how many evaluations: they may differ in sampler and samples."""
    found: dict[Column, list[float]] = {}
    for cell in described["evaluations"]:
        found.setdefault(Column(cell["metric"], cell["num_images"], cell["nfe"]), []).append(cell["value"])
    return {column: (min(values), len(values)) for column, values in found.items()}


def main(argv: Sequence[str]) -> None:
    """List the training runs of a folder of outputs, those that fit the filters."""
    args = parser().parse_args(argv)
    require(args.outputs.is_dir(), "OUTPUTS", args.outputs, "no such folder; give the one that training wrote into, e.g. outputs")
    found = list(listed(args.outputs))
    require_known(args.tag, [item[1] for item in found])
    for text in args.where:
        found = filtered(found, text)
    found = [item for item in found if set(args.tag) <= {*item[1]["tags"]}]
    for key in ("experiment", "study"):
        wanted = getattr(args, key)
        found = [item for item in found if wanted in (None, item[1]["made_by"].get(key))]
    described = sorted((item[1] for item in found), key=order(args.sort))
    print(json.dumps(described, indent=1) if args.json else table(described))


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab runs", description="List training runs, from the files in a folder of outputs alone.")
    add = made.add_argument
    add("outputs", nargs="?", type=Path, default=Path("outputs"), metavar="OUTPUTS", help="where artifacts are kept (outputs)")
    add("--experiment", metavar="X", help="those that were made with experiment=X")
    add("--study", metavar="X", help="those that were first made by study=X")
    on = f"those with this on: {', '.join(IMPROVEMENTS)}; {', '.join(STAGES)} (all of a stage)"
    of = "or of this data set or experiment; may be repeated"
    add("--tag", action="append", default=[], metavar="TAG", help=f"{on}; {of}")
    add("--where", action="append", default=[], metavar="KEY=VALUE", help="those whose configuration says so, e.g. seed=10")
    add("--sort", default="started", metavar="BY", help=f"{', '.join(SORTS)}, or a number of steps, e.g. nfe9 (started)")
    add("--json", action="store_true", help="everything known, as JSON")
    return made


def require_known(wanted: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `UserError` for a tag that no run could have, or has, which lists those that there are."""
    of_runs = {tag for run in runs for tag in run["tags"]} - {*IMPROVEMENTS, *STAGES}
    known = [*IMPROVEMENTS, *STAGES, *sorted(of_runs)]
    for tag in wanted:
        require(not runs or tag in known, "--tag", tag, f"must be one of {', '.join(known)}")


def filtered(found: list[tuple[Run, dict[str, Any]]], text: str) -> list[tuple[Run, dict[str, Any]]]:
    """The runs whose configuration holds `key=value`; a member of a group is named by its class, e.g. dyn.time=Cosh."""
    key, sign, value = text.partition("=")
    require(bool(key and sign), "--where", text, "must be key=value, e.g. training.lr=0.001")
    known = [(item, select(item[0].config, key)) for item in found if _has(item[0].config, key)]
    if found and not known:
        raise bad_value("--where", text, "no run has that key; see a run's config.yaml")
    wanted = yaml.safe_load(value)
    return [item for item, there in known if named(there) == wanted or str(named(there)) == value]


def _has(config: Mapping[str, Any], key: str) -> bool:
    try:
        select(config, key)
    except KeyError:
        return False
    return True


def order(by: str) -> Callable[[dict[str, Any]], Any]:
    """How runs are sorted: the newest, the largest or the best first; those that were not measured last."""
    steps = by.removeprefix("nfe")
    require(by in SORTS or steps.isdigit(), "--sort", by, f"must be one of {', '.join(SORTS)}, or e.g. nfe9")
    if steps.isdigit():
        return lambda run: _best_first(run, int(steps))
    return lambda run: -run[by] if by in ("started", "images") else (run[by], -run["started"])


def _best_first(run: Mapping[str, Any], nfe: int) -> tuple[bool, list[Any]]:
    """Sorts by the distance at so many steps: those of one metric and N stay together, the largest N first."""
    found = sorted((c.metric, -c.num_images, value) for c, (value, _) in lowest(run).items() if c.nfe == nfe)
    return not found, found


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs in columns, one a line; the distances are those that an evaluation calls primary."""
    if not runs:
        return "no runs"
    columns = sorted({column for run in runs for column in lowest(run)}, key=lambda c: (c.metric, -c.num_images, c.nfe))
    rows = [["key", "name", "what", "data", "on", "images", "state", *titles(columns)]]
    for run in runs:
        found, on = lowest(run), "+".join(run["improvements"]) or "-"
        about = [run["key"], run["name"] or "-", run["what"], run["data"], on, f"{run['images']:,}", run["state"]]
        rows.append([*about, *(_shown(*found[column]) if column in found else "" for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *notes(runs)])


def titles(columns: Sequence[Column]) -> list[str]:
    """What stands above the distances: the number of steps, and whatever else tells columns apart."""
    metrics, sizes = ({column[i] for column in columns} for i in (0, 1))
    also = [(c.metric if len(metrics) > 1 else "", f"N={c.num_images}" if len(sizes) > 1 else "") for c in columns]
    return [" ".join(filter(None, (f"{c.nfe} NFE", *words))) for c, words in zip(columns, also, strict=True)]


def _shown(value: float, count: int) -> str:
    return f"{value:.4g}" + (f" ({count})" if count > 1 else "")


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the distances below NFE are, and what a number in brackets means."""
    kinds = sorted({(column.metric, column.num_images) for run in runs for column in lowest(run)})
    several = any(count > 1 for run in runs for _, count in lowest(run).values())
    words = ", ".join(f"{metric} of N = {size:,} samples" for metric, size in kinds)
    apart = "; compare within a column only" if len(kinds) > 1 else ""
    said = [f"NFE: {words}, lower is better{apart}"] if kinds else []
    return said + (
        ["(n): the lowest of n evaluations, of other samplers, averages or noise; --json lists them"] if several else []
    )
