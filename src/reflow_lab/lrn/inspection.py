"""The verb `store`: what a folder of pairs holds (info), whether it is what it says (verify), how its coupling is (diagnose)."""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from ..arguments import Parser
from ..artifacts import digest, file_hash, read_json
from ..data.sets import SampleSet
from ..data.sources import DataSource
from ..errors import UserError, require
from ..evaluation.features import Lite0Features
from ..filling import Draw, threads
from ..flow import MeanVelocity
from ..inf import guidance
from ..networks import files
from ..networks.precision import InPrecision
from ..noise import Indices, chunks, permutation, uniform
from ..progress import track
from ..shards import decode, encode
from . import diagnostics, projected
from .pairs import solve
from .projected import Marginal
from .projection import HeldOut
from .store import PairStore

ORIGIN = {"device", "processor", "threads", "torch", "reflow_lab", "teacher_path", "teacher_profile", "data"}
DATA = "reflow_lab.data."  #: where a store's description of its data may point
METHODS = "reflow_lab.lrn.projection"  #: of its projection
RULES = "reflow_lab.inf."  #: of its solver and grid


def main(argv: Sequence[str]) -> None:
    """Run `store info`, `store verify` or `store diagnose` on a folder."""
    args = parser().parse_args(argv)
    require(args.pairs >= 1, "--pairs", args.pairs, "must be at least 1")
    store = PairStore(args.folder, None)
    require((args.folder / "manifest.json").exists(), "folder", args.folder, "holds no finished pair store")
    if missing := sorted(ORIGIN - store.manifest["made_by"].keys()):
        raise UserError(
            f"{args.folder / 'manifest.json'}: made_by lacks {', '.join(missing)}: another version's; make the pairs again"
        )
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        found = VERBS[args.what](store, args)
    if args.json:
        print(json.dumps(found, indent=1))


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab store", description="Look into a finished pair store.")
    add = made.add_argument
    add("what", choices=list(VERBS), help="origin and moments; checksums and a second drawing; the coupling itself")
    add("folder", type=Path, help="outputs/pairs/KEY, as `reflow-lab pairs` prints it")
    add("--pairs", type=int, default=5000, help="how many pairs, at random, info and diagnose look at (default 5000)")
    add("--batches", type=int, default=2, help="verify: how many batches, at random, are drawn again (default 2)")
    add("--tolerance", type=float, default=0.05, help="verify: norm of a pair's difference over its norm (default 0.05)")
    add("--teacher", help="verify: the run folder or weight file, where it no longer is where it was")
    add("--velocity", help="diagnose: a flow trained on these pairs (run folder or weight file): its loss, and the bias it adds")
    add("--seed", type=int, help="of the random choice; by default another one each time")
    add("--json", action="store_true", help="JSON on stdout, the text on stderr")
    return made


def described(store: PairStore) -> dict[str, str]:
    """The origin of a store, for people."""
    about, by = store.manifest, store.manifest["made_by"]
    paths = [store.folder / shard["file"] for shard in about["shards"]]
    total = sum(path.stat().st_size for path in paths if path.exists())
    shape, solver, grid = " x ".join(map(str, about["shape"])), in_words(about["solver"]), in_words(about["grid"])
    held = f"{len(store):,} {about['kind']} pairs of {shape}; {about['half']} stored as {about['dtype']}"
    rules = f"{solver} on {grid}, {about['nfe']} NFE, t_max {about['t_max']:.6g}, {about['precision']}"
    threads_used, led = by["threads"] or "any", guidance.in_words(about["guidance"])
    origin = f"{by['device']} ({by['processor']}), {threads_used} threads, torch {by['torch']}, reflow_lab {by['reflow_lab']}"
    lines = {
        "pairs": f"{held} in {len(about['shards'])} shards, {total / 1e6:,.1f} MB",
        "teacher": f"{about['teacher']} ({by['teacher_path']}), {about['num_classes'] or 'no'} classes",
        "drawn by": f"{rules}, guidance {led}; seed {about['seed']}, {about['batch_size']} at a time",
        "made on": origin,
    }
    if about["kind"] == "projected":
        lines |= described_projection(about)
    if about["half"] == "x1":
        lines["images"] = f"{by['data']['_target_']}, flips {about['flips']}, start noise {about['start_noise']}"
    return lines


def in_words(node: dict[str, Any]) -> str:
    """A member of a group by its class and settings, e.g. `DPM (r 0.4)`."""
    settings = ", ".join(f"{key} {value}" for key, value in node.items() if key != "_target_")
    return node["_target_"].rpartition(".")[2] + (f" ({settings})" if settings else "")


def described_projection(about: dict[str, Any]) -> dict[str, str]:
    """What a projection started from and what it did to both marginals."""
    found = about["made_by"]["projection"]
    method = about["projection"]["_target_"].rpartition(".")[2]
    reached = f"lam_proj {found['lam_proj']:g}, displacement {found['displacement']:.4g}"
    lines = {"projected": f"from {about['source']} by {method}, {reached}"}
    for half, marginal in found["marginals"].items():
        before, after, floor = (f"{marginal[key]:.4g}" for key in ("before", "after", "floor"))
        lines[half] = (
            f"{marginal['metric']} {before} before, {after} after; floor {floor} (n = {found['num_judged']:,}, held out)"
        )
    return lines


def info(store: PairStore, args: Any) -> dict[str, Any]:
    """Print provenance, counts, class balance and the moments of both marginals."""
    lines = described(store)
    for name, text in lines.items():
        print(f"{name:9} {text}")
    if gone := [shard["file"] for shard in store.manifest["shards"] if not (store.folder / shard["file"]).exists()]:
        raise UserError(f"{store.folder}: {', '.join(gone[:5])} missing; see reflow-lab store verify")
    store, missing = with_images(store)
    if missing:
        print(f"images    not found, so only the stored half is shown: {missing}")
    counts = class_counts(store)
    if counts:
        least, most = min(counts), max(counts)
        some = ", ".join(map(str, counts[:20])) + (", ..." if len(counts) > 20 else "")
        print(f"classes   {len(counts)}, {least:,} to {most:,} pairs each: {some}")
    found = {name: diagnostics.moments(halves) for name, halves in sampled_halves(store, args).items()}
    print(
        f"\n{min(args.pairs, len(store)):,} pairs at random", *diagnostics.beside_white(found, store.manifest["shape"]), sep="\n"
    )
    return {**store.manifest, "class_counts": counts, "moments": found}


def chosen(store: PairStore, args: Any) -> Indices:
    """Pairs at random, each once, in order of their place."""
    return np.sort(permutation(new_seed(args), "store/chosen", len(store))[: args.pairs])


def new_seed(args: Any) -> int:
    """The given seed, or a new one."""
    return secrets.randbits(31) if args.seed is None else int(args.seed)


def sampled_halves(store: PairStore, args: Any) -> dict[str, Iterator[Tensor]]:
    """x0 and x1 of pairs at random, in chunks; the derived half only where it can be had."""
    indices, half = chosen(store, args), store.manifest["half"]
    other = "x1" if half == "x0" else "x0"
    halves = {half: (store.stored(chunk) for chunk in chunks(indices, 500))}
    if half == "x0" or store.images is not None:
        halves[other] = (store.derived(chunk) for chunk in chunks(indices, 500))
    return {name: halves[name] for name in ("x0", "x1") if name in halves}


def class_counts(store: PairStore) -> list[int]:
    """How many pairs each class has; empty without classes, or without the images that have them."""
    about = store.manifest
    if not about["num_classes"] or (about["half"] == "x1" and store.images is None):
        return []
    counts = torch.zeros(about["num_classes"], dtype=torch.int64)
    for indices in chunks(np.arange(len(store)), 2**16):
        labels = store.labels(indices)
        assert labels is not None
        counts += torch.bincount(labels, minlength=about["num_classes"])
    return counts.tolist()


def with_images(store: PairStore) -> tuple[PairStore, str]:
    """The store with the data set that its forward pairs refer to, or why that cannot be read."""
    about = store.manifest
    if about["half"] == "x0":
        return store, ""
    try:
        return PairStore(store.folder, images_of(about)), ""
    except UserError as error:
        return store, str(error)


def data_of(about: dict[str, Any]) -> DataSource:
    """The data set that a manifest's pairs belong to."""
    data = about["made_by"]["data"]
    files.require_own(data, DATA, "manifest.json: data")
    source: DataSource = instantiate(data)
    return source


def images_of(about: dict[str, Any]) -> SampleSet:
    """The training images of a manifest's data set; raises a `UserError` if they are missing or others."""
    images, name = data_of(about).split("train"), about["made_by"]["data"]["_target_"]
    require(images.content_hash == about["data"], "data", name, "is no longer the data that these pairs were made from")
    return images


def verify(store: PairStore, args: Any) -> dict[str, Any]:
    """Check every checksum, then let the teacher draw batches at random again; raises a `UserError` that names what is bad."""
    checked = check_shards(store)
    print(f"checksums: {checked} shards as they were written")
    require(args.batches >= 0, "--batches", args.batches, "must be at least 0")
    found: dict[str, Any] = {"shards": checked, "batches": args.batches}
    if args.batches:
        found |= draw_again(store, args)
        same, largest = found["identical_pairs"], found["largest_difference"]
        print(f"drawn again: {same} of {found['pairs']} pairs to the last bit; largest relative difference {largest:.2g}")
    return found


def check_shards(store: PairStore) -> int:
    """How many shards there are; raises a `UserError` naming those that are missing or differ from their checksum."""
    shards, bad = store.manifest["shards"], []
    for shard in track_items(shards, "checksums", "shards"):
        path = store.folder / shard["file"]
        if not path.exists():
            bad.append(f"{path} is missing")
        elif file_hash(path) != shard["sha256"]:
            bad.append(f"{path} was changed after it was written")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{'; '.join(bad[:5])}{more}; delete these and {store.folder / 'done.json'}, and repeat the pairs command"
        )
    return len(shards)


def track_items(items: list[Any], description: str, unit: str) -> Iterator[Any]:
    """The items, with a bar."""
    return (item for item, _ in zip(items, track([1] * len(items), description, len(items), unit), strict=True))


def draw_again(store: PairStore, args: Any) -> dict[str, Any]:
    """Batches at random, made again with the threads of then, against what is stored."""
    about, differences, identical = store.manifest, [], 0
    batches, redraw = batches_of(about), redrawing(store, args)
    picks = (uniform(new_seed(args), "store/verify", np.arange(args.batches))[:, 0] * len(batches)).long().tolist()
    with threads(about["made_by"]["threads"]):
        for pick in picks:
            again = encode(torch.cat(list(redraw(batches[pick]))), about["dtype"]).cpu()
            there = torch.from_numpy(store.rows(batches[pick]))
            identical += int((again == there).flatten(1).all(1).sum())
            relative = (decode(again) - decode(there)).flatten(1).norm(dim=1) / decode(there).flatten(1).norm(dim=1)
            differences.append(relative)
            worst = int(relative.argmax())
            reason = f"differs by {relative[worst]:.3g} from what this teacher makes; at most {args.tolerance} is allowed"
            require(bool(relative[worst] <= args.tolerance), "pair", batches[pick][worst], reason)
    found = torch.cat(differences)
    return {"pairs": len(found), "identical_pairs": identical, "largest_difference": float(found.max())}


def redrawing(store: PairStore, args: Any) -> Draw:
    """What makes pairs of this store again: its teacher, or, of a projected one, its map and the store that it moved."""
    about = store.manifest
    if about["kind"] == "projected":
        return redrawing_projected(store)
    files.require_own([about["solver"], about["grid"]], RULES, "manifest.json: solver, grid")
    velocity, device = teacher_of(about, args)
    images = images_of(about) if about["kind"] == "forward" else None
    return lambda indices: solve(velocity, about, images, indices, device)  # type: ignore[arg-type]


def redrawing_projected(store: PairStore) -> Draw:
    """The map of a projected store applied to its source once more; raises a `UserError` if the source is gone or another."""
    about, device = store.manifest, torch.device("cpu")
    folder = Path(about["made_by"]["source_folder"])
    source = PairStore(folder, images_of(about) if about["half"] == "x1" else None)
    found = digest(read_json(folder / "recipe.json"))
    require(found == about["source"], "source", folder, f"has the key {found}, the pairs come from {about['source']}")
    files.require_own(about["projection"], METHODS, "manifest.json: projection")
    projection = projected.load(store.folder / projected.MAP, instantiate(about["projection"]), device)
    return lambda indices: projected.moved(projection, source, indices, about["batch_size"], device)


def batches_of(about: dict[str, Any]) -> list[Indices]:
    """The batches that a store was drawn in: shards cut into pieces."""
    shards = chunks(np.arange(about["count"]), about["shard_size"])
    return [batch for shard in shards for batch in chunks(shard, about["batch_size"])]


def teacher_of(about: dict[str, Any], args: Any) -> tuple[MeanVelocity, torch.device]:
    """The teacher of a store, guided as then, on the GPU where there is one; raises a `UserError` if a file is another one."""
    by = about["made_by"]
    path = files.find(args.teacher) if args.teacher else files.find(by["teacher_path"], by["teacher_profile"])
    found = files.weights_hash(path)
    require(
        found == about["teacher"], "--teacher", path, f"has the hash {found}, but these pairs were drawn by {about['teacher']}"
    )
    device, precision = torch.device("cuda" if torch.cuda.is_available() else "cpu"), about["precision"]
    network = InPrecision(files.load(path), precision).to(device).eval()
    return guidance.again(about["guidance"], by, files.describe(path)).velocity(network, precision, device), device


def diagnose(store: PairStore, args: Any) -> dict[str, Any]:
    """Print how straight the coupling is, how often its lines cross, how far both marginals are from what they should be.

    With a velocity trained on the pairs also the bias that it adds to x0's marginal.
    """
    store, missing = with_images(store)
    require(not missing, "folder", store.folder, missing)
    x0, x1, label, _ = store.read(chosen(store, args))
    label = label if store.manifest["num_classes"] else None
    velocity = velocity_of(store, args.velocity) if args.velocity else None
    found = diagnostics.diagnose(x0, x1, label, velocity, num_neighbours=min(64, len(x0) // 8))
    print(diagnostics.table(found))
    found["marginals"] = {}
    for half in ("x0", "x1"):
        marginal = Marginal(store, half, data_of(store.manifest), new_seed(args), Lite0Features())
        heldout = marginal.heldout()
        distance = {"distance": heldout.distance(heldout.x, heldout.target), "floor": heldout.floor}
        found["marginals"][half] = {"metric": marginal.metric, **distance, "num": marginal.num_judged}
        law = "data" if half == "x0" else "N(0, I)"
        print(f"{half} to the {law}: {marginal.metric} {distance['distance']:.4g}, floor {distance['floor']:.4g}")
        if half == "x0" and velocity is not None:
            found["rectification"] = bias(store, velocity, marginal, heldout)
    return found


def bias(store: PairStore, velocity: MeanVelocity, marginal: Marginal, heldout: HeldOut) -> dict[str, float]:
    """What a rectification adds to the distance between x0's marginal and the data, sampled as the pairs were drawn."""
    about, batch = store.manifest, store.read(marginal.judged())
    files.require_own([about["solver"], about["grid"]], RULES, "manifest.json: solver, grid")
    rules = {
        "solver": instantiate(about["solver"]),
        "grid": instantiate(about["grid"]),
        "nfe": about["nfe"],
        "t_max": about["t_max"],
    }
    found = diagnostics.rectification_bias(
        velocity, batch.x0, batch.x1, heldout.target, heldout.distance, batch.label, about["batch_size"], **rules
    )
    print(f"one rectification: {found['coupling']:.4g} before, {found['flow']:.4g} after: a bias of {found['bias']:+.4g}")
    return found


def velocity_of(store: PairStore, run: str) -> MeanVelocity:
    """A trained flow, checked against the store's shape and classes."""
    path, about = files.find(run), store.manifest
    if files.weights_hash(path) == about["teacher"]:
        print("--velocity is the teacher of these pairs: it draws them again, so its bias says nothing")
    description = files.describe(path)
    shape, classes = list(description["shape"]), description["num_classes"]
    require(shape == about["shape"], "--velocity", path, f"makes samples of shape {shape}, the store holds {about['shape']}")
    require(
        classes in (0, about["num_classes"]), "--velocity", path, f"takes {classes} classes, the store has {about['num_classes']}"
    )
    return InPrecision(files.load(path), about["precision"]).eval()


VERBS: dict[str, Callable[[PairStore, Any], dict[str, Any]]] = {"info": info, "verify": verify, "diagnose": diagnose}
