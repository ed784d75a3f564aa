"""The verb `ema`: averages of any length after training, from stored ones (EDM2, arXiv 2312.02696, section 3.2)."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import Parser
from ..artifacts import Artifact, file_hash
from ..errors import require
from ..networks import files, import_pickle
from ..progress import Bar
from .ema import sigma_name
from .power_ema import WIDEST, Array, Average, residuals, weights

EDM2_NAME = re.compile(r"(?P<prefix>.*)-(?P<kimg>\d+)-(?P<sigma_rel>0\.\d+)\.pkl")
EDM2_BATCH = 1024  #: its numbers of images are multiples of it, its file names say whole thousands
SUSPECT, USELESS = 0.05, 0.25  #: relative residuals of a profile above which we warn, refuse


@dataclass(frozen=True)
class Snapshot:
    """A stored average, and what its weights share with no other training: the run's key or the files' prefix."""

    path: Path
    average: Average
    origin: str


@dataclass(frozen=True)
class Target:
    """An average that is wanted, and where it goes."""

    average: Average
    path: Path


def main(argv: Sequence[str]) -> None:
    """Write an average of every width asked for, and say how near its profile came."""
    args = parser().parse_args(argv)
    known = until(consistent([snapshot for source in args.source for snapshot in find(source)]), args.kimg)
    targets = [Target(average, path) for average, path in placed(args, known)]
    averages = [snapshot.average for snapshot in known]
    rows = weights([target.average for target in targets], averages)
    misses = residuals([target.average for target in targets], averages, rows)
    for target, miss in zip(targets, misses, strict=True):
        require_carried(target.average, float(miss), averages)
    write(targets, known, rows)
    for target, miss in zip(targets, misses, strict=True):
        print(f"{target.path}: from {len(known)} snapshots, its profile off by {miss:.2%}{advice(float(miss))}")


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab ema", description="Make averages of any length from stored ones (EDM2's post-hoc EMA).")
    made.add_argument("source", nargs="+", type=Path, metavar="SOURCE", help="a finished run with snapshots, a folder or files")
    made.add_argument("--sigma-rel", required=True, type=widths, metavar="W,W,...", help="relative widths, e.g. 0.03,0.075,0.15")
    made.add_argument("--kimg", type=float, help="the average at this time, one of the snapshots'; default: the last")
    made.add_argument("--out", type=Path, metavar="FILE|FOLDER", help="default: the run's weights/, or the working folder")
    return made


def widths(text: str) -> list[float]:
    """Relative widths from a comma-separated list."""
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    require(bool(found) and all(0 < w < WIDEST for w in found), "--sigma-rel", text, "must be numbers between 0 and 0.288")
    return found


def find(source: Path) -> list[Snapshot]:
    """The snapshots of a run, of a folder, or the one of a file."""
    if not source.is_dir():
        return [read(source)]
    if is_run(source):
        require(Artifact(source, {}).is_done(), "source", source, "is not finished; repeat its train command to resume it")
        folder, missing = source / "snapshots", "has no snapshots; training.snapshot_every_kimg makes a training store them"
    else:
        folder, missing = source, "holds no snapshots: a run folder, or .safetensors or .pkl files are wanted"
    found = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".pkl") and path.name[0] != ".")
    require(bool(found), "source", source, missing)
    return [read(path) for path in found]


def is_run(source: Path) -> bool:
    """Whether it is the folder of a training."""
    return (source / "recipe.json").exists()


def read(path: Path) -> Snapshot:
    """What a file says it is: ours in its description, EDM2's raw snapshots in their names, PREFIX-KIMG-SIGMA.pkl."""
    if path.suffix != ".pkl":
        about = files.describe(path)
        require("ema" in about, "source", path, "is no snapshot: it does not say of which average")
        return snapshot(path, about["ema"]["images"], about["ema"]["sigma_rel"], about["run"])
    name = EDM2_NAME.fullmatch(path.name)
    require(name is not None, "source", path, "cannot be placed: a snapshot of EDM2 is named PREFIX-KIMG-SIGMA.pkl")
    assert name is not None
    return snapshot(path, edm2_images(int(name["kimg"])), float(name["sigma_rel"]), name["prefix"])


def snapshot(path: Path, images: float, sigma_rel: float, origin: str) -> Snapshot:
    """A snapshot; raises a `UserError` for an average that there is not."""
    require(images > 0 and 0 < sigma_rel < WIDEST, "source", path, f"no average has width {sigma_rel} after {images} images")
    return Snapshot(path, Average(images, sigma_rel), origin)


def edm2_images(kimg: int) -> int:
    """The number of images behind EDM2's name: the multiple of its batch that rounds down to it, if there is one."""
    images = -(-kimg * 1000 // EDM2_BATCH) * EDM2_BATCH
    return images if images // 1000 == kimg else kimg * 1000


def consistent(snapshots: list[Snapshot]) -> list[Snapshot]:
    """In the order of time; raises a `UserError` unless they are different averages of one training."""
    require(len(snapshots) > 1, "source", ", ".join(str(s.path) for s in snapshots), "at least two snapshots are wanted")
    ordered = sorted(snapshots, key=lambda snapshot: snapshot.average)
    for one, other in itertools.pairwise(ordered):
        same = f"is of {other.origin}, but {one.path} is of {one.origin}: one training has to be behind all snapshots"
        require(one.origin == other.origin, "source", other.path, same)
        require(one.average != other.average, "source", other.path, f"is the same average as {one.path}")
    return ordered


def until(snapshots: list[Snapshot], kimg: float | None) -> list[Snapshot]:
    """Those up to the time that --kimg means, which is a snapshot's to within a thousand images."""
    if kimg is None:
        return snapshots
    times = sorted({snapshot.average.images for snapshot in snapshots})
    end = min(times, key=lambda images: abs(images / 1000 - kimg))
    shown = ", ".join(f"{images / 1000:.10g}" for images in times)
    require(abs(end / 1000 - kimg) < 1, "--kimg", f"{kimg:g}", f"no snapshot ends there; allowed: {shown}")
    kept = [snapshot for snapshot in snapshots if snapshot.average.images <= end]
    require(len(kept) > 1, "--kimg", f"{kimg:g}", "at least two snapshots up to there are wanted")
    return kept


def placed(args: Any, known: list[Snapshot]) -> list[tuple[Average, Path]]:
    """The averages that are wanted, and their files; raises a `UserError` before anything is read."""
    end = known[-1].average.images
    wanted = [Average(end, width) for width in args.sigma_rel]
    if args.out is not None and args.out.suffix == ".safetensors":
        require(len(wanted) == 1, "--out", args.out, "several widths need a folder")
        require(args.out.parent.is_dir(), "--out", args.out, "its folder does not exist")
        return [(wanted[0], args.out)]
    of_run = len(args.source) == 1 and is_run(args.source[0])
    folder = args.out or (args.source[0] / "weights" if of_run else Path())
    require(folder.is_dir(), "--out", folder, "no such folder")
    return [(average, folder / f"{stem(average, known, args.kimg is not None)}.safetensors") for average in wanted]


def stem(average: Average, known: list[Snapshot], timed: bool) -> str:
    """EDM2's kind of name for its snapshots; of ours the profile, with the time where it was asked for."""
    if known[-1].path.suffix == ".pkl":
        return f"{known[-1].origin}-{int(average.images) // 1000:07d}-{average.sigma_rel:.3g}"
    return sigma_name(average.sigma_rel) + (f"-{average.images / 1000:.10g}kimg" if timed else "")


def require_carried(wanted: Average, miss: float, known: Sequence[Average]) -> None:
    """Raise a `UserError` if the snapshots cannot carry an average: too few, or of widths too far from it."""
    have = ", ".join(f"{width:g}" for width in sorted({average.sigma_rel for average in known}))
    lacking = f"{len(known)} snapshots of width {have} cannot carry it: the nearest profile is off by {miss:.0%}"
    require(miss <= USELESS, "--sigma-rel", f"{wanted.sigma_rel:g}", lacking)


def advice(miss: float) -> str:
    """What to say of a profile that came out badly."""
    return "; more snapshots, or a width nearer to theirs, would come nearer" if miss > SUSPECT else ""


def write(targets: Sequence[Target], known: Sequence[Snapshot], rows: Array) -> None:
    """Write what is not there yet; `rows` are the weights (targets, snapshots)."""
    hashes = {snapshot.path.name: file_hash(snapshot.path)[:16] for snapshot in known}
    made = [{"images": t.average.images, "sigma_rel": t.average.sigma_rel, "snapshots": hashes} for t in targets]
    missing = [k for k, target in enumerate(targets) if not is_there(target, made[k], known)]
    if not missing:
        return
    about, states = weighted(known, rows[missing])
    for k, state in zip(missing, states, strict=True):
        average, path = targets[k].average, targets[k].path
        own = {"profile": path.stem, "kimg": average.images / 1000, "posthoc": made[k]}
        files.save_state(state, path, {key: about[key] for key in about if key != "ema"} | own)


def is_there(target: Target, made: dict[str, Any], known: Sequence[Snapshot]) -> bool:
    """Whether the file is this average already, from the same snapshots or because training followed it; another is refused."""
    if not target.path.exists():
        return False
    about, run = files.describe(target.path), target.path.resolve().parents[1]
    followed = about.get("profile") == sigma_name(target.average.sigma_rel) and "posthoc" not in about
    same = about.get("posthoc") == made or (followed and known[-1].path.resolve().parent == run / "snapshots")
    require(same, "--out", target.path, "is there already and holds something else")
    return True


def weighted(known: Sequence[Snapshot], rows: Array) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The description and, for each row of weights, the weighted sum of the snapshots' weights, float32.

    One snapshot is in memory at a time. What is no parameter (fixed frequencies) is the same in all: taken as it is.
    """
    net: dict[str, Any] = {}
    sums = [dict[str, Tensor]() for _ in rows]
    with Bar("reading snapshots", len(known), "snapshots") as bar:
        for snapshot, column in zip(known, rows.T, strict=True):
            about, state = content(snapshot)
            net = net or about["net"]
            require(about["net"] == net, "source", snapshot.path, f"belongs to another network than {known[0].path}")
            for total, weight in zip(sums, column, strict=True):
                add(total, state, float(weight))
            bar.advance(1)
    learned = {key for key, _ in import_pickle.filled(net, sums[0]).named_parameters()}
    fixed = {key: tensor.float() for key, tensor in state.items() if key not in learned}
    return about, [total | fixed for total in sums]


def add(total: dict[str, Tensor], state: dict[str, Tensor], weight: float) -> None:
    """total += weight * state, tensor by tensor; an empty total is 0."""
    for key, tensor in state.items():
        total.setdefault(key, torch.zeros_like(tensor, dtype=torch.float32)).add_(tensor, alpha=weight)


def content(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a snapshot; an EDM2 pickle's by the restricted reader."""
    if snapshot.path.suffix == ".pkl":
        network, about = import_pickle.read(snapshot.path)
        return about, network.state_dict()
    about = files.describe(snapshot.path)
    files.require_own(about["net"], files.NETWORKS, snapshot.path)
    return about, files.read_state(snapshot.path)
