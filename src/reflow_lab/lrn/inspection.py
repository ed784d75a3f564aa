"""The verb `store`: what a folder of pairs holds (info), whether it is what it says (verify), how its coupling is (diagnose)."""

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from ..arguments import Parser
from ..artifacts import file_hash
from ..data.sets import SampleSet
from ..errors import UserError, require
from ..networks import files
from ..networks.precision import InPrecision
from ..noise import Indices, chunks, uniform
from ..progress import track
from . import diagnostics
from .generation import threads
from .pairs import solve
from .store import PairStore, decode, encode

DATA = "reflow_lab.data."  #: where a store's description of its data may point
MOMENTS = ("mean", "std", "skewness", "kurtosis", "min", "max", "energy_mean", "energy_std")


def main(argv: Sequence[str]) -> None:
    """Run `store info`, `store verify` or `store diagnose` on a folder."""
    args = parser().parse_args(argv)
    require(args.pairs >= 1, "--pairs", args.pairs, "must be at least 1")
    store = PairStore(args.folder, None)
    require((args.folder / "manifest.json").exists(), "folder", args.folder, "holds no finished pair store")
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
    add("--velocity", help="diagnose: a run folder or weight file, whose loss bounds the straightness of the pairs")
    add("--seed", type=int, help="of the random choice; by default another one each time")
    add("--json", action="store_true", help="print what was found as JSON after the text")
    return made


def described(store: PairStore) -> dict[str, str]:
    """The origin of a store, for people."""
    about, by = store.manifest, store.manifest["made_by"]
    total = sum((store.folder / shard["file"]).stat().st_size for shard in about["shards"])
    shape, short = " x ".join(map(str, about["shape"])), {"solver": "", "grid": ""}
    for name in short:
        values = {key: value for key, value in about[name].items() if key != "_target_"}
        words = ", ".join(f"{key} {value}" for key, value in values.items())
        short[name] = about[name]["_target_"].rpartition(".")[2] + (f" ({words})" if words else "")
    held = f"{len(store):,} {about['kind']} pairs of {shape}; {about['half']} stored as {about['dtype']}"
    rules = f"{short['solver']} on {short['grid']}, {about['nfe']} NFE, t_max {about['t_max']:.6g}, {about['precision']}"
    lines = {
        "pairs": f"{held} in {len(about['shards'])} shards, {total / 1e6:,.1f} MB",
        "teacher": f"{about['teacher']} ({by['teacher_path']}), {about['num_classes'] or 'no'} classes",
        "drawn by": f"{rules}, guidance {about['guidance'] or 'none'}; seed {about['seed']}, {about['batch_size']} at a time",
        "made on": f"{by['device']}, {by['threads']} threads, {by['cpu']}, torch {by['torch']}, reflow_lab {by['reflow_lab']}",
    }
    if about["half"] == "x1":
        lines["images"] = f"{by['data']['_target_']}, flips {about['flips']}, start noise {about['start_noise']}"
    return lines


def info(store: PairStore, args: Any) -> dict[str, Any]:
    """Print provenance, counts, class balance and the moments of both marginals."""
    lines = described(store)
    for name, text in lines.items():
        print(f"{name:9} {text}")
    store, missing = with_images(store)
    if missing:
        print(f"images    not found, so only the stored half is shown: {missing}")
    counts = class_counts(store)
    if counts:
        least, most = min(counts), max(counts)
        print(f"classes   {len(counts)}, {least:,} to {most:,} pairs each: {', '.join(map(str, counts[:20]))}")
    found = {name: diagnostics.moments(halves) for name, halves in sampled_halves(store, args).items()}
    print(f"\n{'':4}" + "".join(f"{name:>12}" for name in MOMENTS) + f"   ({min(args.pairs, len(store)):,} pairs at random)")
    for name, values in found.items():
        print(f"{name:4}" + "".join(f"{values[key]:12.4f}" for key in MOMENTS))
    ideal = (0, 1, 0, 3, "", "", 1, f"{(2 / np.prod(store.manifest['shape'])) ** 0.5:.4f}")
    print("N01 " + "".join(f"{value:>12}" for value in ideal))
    return {**store.manifest, "class_counts": counts, "moments": found}


def chosen(store: PairStore, args: Any) -> Indices:
    """Pairs at random, in order of their place."""
    seed, size = new_seed(args), len(store)
    if args.pairs >= size:
        return np.arange(size)
    return np.unique((uniform(seed, "store/chosen", np.arange(args.pairs))[:, 0] * size).long().numpy())


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


def images_of(about: dict[str, Any]) -> SampleSet:
    """The training images of a manifest's data set; raises a `UserError` if they are missing or others."""
    data = about["made_by"]["data"]
    require(files.is_own(str(data["_target_"]), DATA), "manifest.json: data", data["_target_"], f"may name only {DATA}*")
    images: SampleSet = instantiate(data).split("train")
    require(
        images.content_hash == about["data"], "data", data["_target_"], "is no longer the data that these pairs were made from"
    )
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
        raise UserError(f"{'; '.join(bad[:5])}{more}; delete {store.folder} to make it again")
    return len(shards)


def track_items(items: list[Any], description: str, unit: str) -> Iterator[Any]:
    """The items, with a bar."""
    return (item for item, _ in zip(items, track([1] * len(items), description, len(items), unit), strict=True))


def draw_again(store: PairStore, args: Any) -> dict[str, Any]:
    """Batches at random, integrated again with the threads of then, against what is stored."""
    about = store.manifest
    velocity, device = teacher_of(about, args)
    images = images_of(about) if about["kind"] == "forward" else None
    batches = batches_of(about)
    picks = (uniform(new_seed(args), "store/verify", np.arange(args.batches))[:, 0] * len(batches)).long().tolist()
    differences, identical, total = [], 0, 0
    with threads(about["made_by"]["threads"]):
        for pick in picks:
            (values,) = solve(velocity, about, images, batches[pick], device)  # type: ignore[arg-type]
            again = encode(values, about["dtype"]).cpu()
            there = torch.from_numpy(store.rows(batches[pick]))
            identical += int((again == there).flatten(1).all(1).sum())
            total += len(again)
            relative = (decode(again) - decode(there)).flatten(1).norm(dim=1) / decode(there).flatten(1).norm(dim=1)
            differences.append(relative)
            worst = int(relative.argmax())
            reason = f"differs by {relative[worst]:.3g} from what this teacher makes; at most {args.tolerance} is allowed"
            require(bool(relative[worst] <= args.tolerance), "pair", batches[pick][worst], reason)
    return {"pairs": total, "identical_pairs": identical, "largest_difference": float(torch.cat(differences).max())}


def batches_of(about: dict[str, Any]) -> list[Indices]:
    """The batches that a store was drawn in: shards cut into pieces."""
    shards = chunks(np.arange(about["count"]), about["shard_size"])
    return [batch for shard in shards for batch in chunks(shard, about["batch_size"])]


def teacher_of(about: dict[str, Any], args: Any) -> tuple[InPrecision, torch.device]:
    """The teacher of a store, on the GPU where there is one; raises a `UserError` if the file is another one."""
    by = about["made_by"]
    path = files.find(args.teacher) if args.teacher else files.find(by["teacher_path"], by["teacher_profile"])
    found = files.weights_hash(path)
    require(
        found == about["teacher"], "--teacher", path, f"has the hash {found}, but these pairs were drawn by {about['teacher']}"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return InPrecision(files.load(path), about["precision"]).to(device).eval(), device


def diagnose(store: PairStore, args: Any) -> dict[str, Any]:
    """Print how straight the coupling is, how far its noise is from white, how often its lines cross."""
    store, missing = with_images(store)
    require(not missing, "folder", store.folder, missing)
    x0, x1, label = store.read(chosen(store, args))
    velocity = InPrecision(files.load(files.find(args.velocity)), store.manifest["precision"]).eval() if args.velocity else None
    found = diagnostics.diagnose(x0, x1, label, velocity)
    print(diagnostics.table(found))
    return found


VERBS: dict[str, Callable[[PairStore, Any], dict[str, Any]]] = {"info": info, "verify": verify, "diagnose": diagnose}
