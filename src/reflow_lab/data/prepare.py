"""The verb `data`: EDM's zip + dataset.json from the official archives, from ImageNet's folders or from one's own images.

The same pixels make the same bytes on any machine, by any number of processes; decoding JPEGs and resizing are Pillow's.
Of imagenet512 latents are made (`encode`).
"""

import argparse
import contextlib
import http.client
import io
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arguments import Parser
from ..artifacts import FULL, file_hash, remove_leftovers, write_atomically
from ..errors import UserError, bad_value, require
from ..progress import Bar, track
from . import cifar, encode
from .archive import MAX_SIDE
from .folder import MODES, SUFFIXES, TRANSFORMS, decode_image
from .official import OFFICIAL, Official
from .sets import ImageSet
from .sources import reading, require_room
from .workers import in_order, sensible_workers
from .zips import LABELS, Files, Members, encode_png, members_of, png_size, read_labels, write_archive

DATA = Path("data")  #: where official files are looked for and zips are written to
MAX_BYTES = 256 << 20  #: of an image file
CHUNK = 32  #: image files that a process converts at a time
FILES_A_WORKER = 500  #: some seconds of conversion
BATCH = re.compile(r"train_data_batch_(\d+)(\.npz)?$")
DOWNSAMPLED_CLASSES = 1000


class Pictures(NamedTuple):
    """What goes into a zip: so many PNGs, and a class for each, or None."""

    pngs: Iterable[bytes]
    number: int
    labels: list[int] | None


def main(argv: Sequence[str]) -> None:
    """Make one archive and say what it is."""
    args = parser().parse_args(argv)
    official = OFFICIAL[args.what]
    settle(args, official)
    there = args.out.exists() and not official.latents
    require(not there, "--out", args.out, "is there already; delete it, or name another file")
    if args.out.parent == DATA:
        DATA.mkdir(exist_ok=True)
    require(args.out.parent.is_dir(), "--out", args.out, "its folder does not exist")
    if official.latents:
        found = found_in(args, official)
        return print(encode.make(args, found, partial(pixels, args, found.members)))
    pictures = READERS.get(args.what, from_files)(args, official)
    write(pictures, args)
    return print(summary(pictures, args, official))


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(
        prog="reflow-lab data",
        description="Make a zip of PNGs + dataset.json, EDM's format, which data=archive reads; of imagenet512 latents.",
    )
    add = made.add_argument
    add("what", choices=list(OFFICIAL), help="an official data set, or any folder or zip of images")
    add("--source", type=Path, nargs="+", metavar="PATH", help="the official file or folder (default: in data/), or the images")
    add("--out", type=Path, metavar="ZIP", help="default: data/NAME-NxN.zip, by EDM's names; of latents a folder")
    size = "pixels (default: 32 for cifar10, 512 for imagenet512, 64 for the others; needed for folder)"
    add("--resolution", type=int, metavar="N", help=size)
    add("--channels", type=int, choices=list(MODES), default=3, help="folder: 1 grey, 3 RGB (default)")
    add("--labels", action=argparse.BooleanOptionalAction, help="classes, sorted by name (default: of cifar10 and ImageNet)")
    add(
        "--split", choices=("train", "test", "all"), help="of cifar10 (default train; test: for data.floor), afhqv2 (default all)"
    )
    add("--transform", choices=list(TRANSFORMS), help="default: center-crop; for ImageNet center-crop-dhariwal, as ADM does it")
    add("--workers", type=int, help="processes (default: one for 500 files, at most one a core); they change no byte")
    add("--any-checksum", action="store_true", help="accept another file than the official one")
    encode.add_words(made.add_argument_group("of imagenet512, whose latents are made (extra `latents`)").add_argument)
    return made


def settle(args: Any, official: Official) -> None:
    """Put defaults where nothing is said, and refuse what the data set does not have."""
    args.resolution = official.resolution if args.resolution is None else args.resolution
    given = args.resolution or None
    require(given is not None and 0 < given <= MAX_SIDE, "--resolution", given, f"must be given: 1 to {MAX_SIDE} pixels")
    args.labels = official.labels if args.labels is None else args.labels
    require(official.has_labels or not args.labels, "--labels", args.what, "has none")
    known = ", ".join(official.counts) or "none"
    require(args.split is None or args.split in official.counts, "--split", args.split, f"the splits of {args.what}: {known}")
    args.split = args.split or official.split
    require(args.what == "folder" or args.channels == 3, "--channels", args.channels, f"{args.what} is RGB")
    require(args.workers is None or args.workers >= 1, "--workers", args.workers, "must be at least 1")
    args.transform = args.transform or official.transform
    part = "" if args.split == official.split else f"-{args.split}"
    kind = "-latents" if official.latents else ".zip"
    args.out = args.out or DATA / f"{official.archive}{part}-{args.resolution}x{args.resolution}{kind}"
    encode.settle(args, official)


def write(pictures: Pictures, args: Any) -> None:
    """The zip, beside its target until it is whole."""
    require_room(args.out.parent, pictures.number * png_size(args.channels, args.resolution), "--out", "for the zip")
    remove_leftovers(args.out.parent, f".{args.out.name}.*.tmp")
    with Bar(f"write {args.out.name}", pictures.number, "images") as bar:
        write_atomically(args.out, lambda path: write_archive(path, counted(pictures.pngs, bar), pictures.labels))


def counted(pngs: Iterable[bytes], bar: Bar) -> Iterator[bytes]:
    """Pass the images through while a bar counts them."""
    for png in pngs:
        yield png
        bar.advance(1)


def summary(pictures: Pictures, args: Any, official: Official) -> str:
    """What was made, what it is called by its content, and how to train on it."""
    classes = 0 if pictures.labels is None else 1 + max(pictures.labels)
    size, expected = f"{args.resolution}x{args.resolution}", official.counts.get(args.split, pictures.number)
    lines = [f"{args.out}: {pictures.number:,} images of {size}, {classes or 'no'} classes", f"SHA-256 {file_hash(args.out)}"]
    if pictures.number != expected:
        lines.append(f"the official set has {expected:,} images")
    keys = {
        "data.path": args.out,
        "data.resolution": args.resolution,
        "data.channels": args.channels,
        "data.num_classes": classes,
    }
    words = " ".join(f"{key}={value}" for key, value in {**keys, **official.options}.items())
    chosen = "" if official.has_own_data else "data=archive "
    use = f"reflow-lab train experiment={official.experiment} {chosen}{words}"
    apart = "" if "all" not in official.counts else ", beside an archive of --split train"
    return "\n".join([*lines, f"real images not to train on{apart}: data.floor={args.out}" if args.split == "test" else use])


def sources(args: Any, official: Official) -> list[Path]:
    """Where the data set lies: as told, or where it is looked for, or fetched there."""
    if args.source:
        return args.source
    places = [[DATA / name for name in place] for place in official.places]
    found = next((paths for paths in places if all(path.exists() for path in paths)), None)
    if found:
        return found
    if not places:
        raise bad_value("--source", None, "must name a folder or a zip of images")
    if official.url is None:
        raise UserError(
            f"{args.what}: fetch {official.file} from {official.page} and put it at {places[0][0]}, or name its --source"
        )
    fetch(official.url, places[0][0], args)
    return places[0]


def only(paths: list[Path]) -> Path:
    """The one source, which has to be there."""
    require(len(paths) == 1, "--source", " ".join(map(str, paths)), "must be one path")
    require(paths[0].exists(), "--source", paths[0], f"no such file or folder ({paths[0].absolute()})")
    return paths[0]


def fetch(url: str, path: Path, args: Any) -> None:
    """Download CIFAR-10's archive; it is only kept if its checksum is right."""
    path.parent.mkdir(exist_ok=True)

    def download(target: Path) -> None:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, target.open("wb") as file:
                copy(answer, file, f"fetch {path.name}", int(answer.headers.get("Content-Length") or 0))
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            raise UserError(f"{url}: cannot be fetched ({error}); put it at {path}, or name its --source") from None
        if not args.any_checksum:
            cifar.require_original(target, str(path), "say --any-checksum")

    write_atomically(path, download)


def copy(answer: IO[bytes], file: IO[bytes], what: str, total: int) -> None:
    """Copy a file with a bar in MB."""
    blocks = iter(lambda: answer.read(1 << 20), b"")
    for _ in track((file.write(block) >> 20 for block in blocks), what, total >> 20, "MB"):
        pass
    if total and file.tell() != total:
        raise OSError(f"{file.tell():,} of {total:,} bytes came")


def from_cifar(args: Any, official: Official) -> Pictures:
    """The original archive, its batches, or sheets."""
    require(args.resolution == cifar.SIDE, "--resolution", args.resolution, f"CIFAR-10 has {cifar.SIDE} pixels")
    path = only(sources(args, official))
    if path.is_file() and not args.any_checksum:
        cifar.require_original(path, "--source", "say --any-checksum")
    kind = "sheets" if path.is_dir() and any(path.glob("*.webp")) else "archive"
    try:
        held = cifar.CIFAR10(str(path), kind, check_md5=False).split("floor" if args.split == "test" else "train")
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "--source=", 1)) from None
    return from_set(held, args.labels)


def from_set(held: ImageSet, labelled: bool) -> Pictures:
    """A set in memory."""
    labels = held.labels.tolist() if labelled and held.labels is not None else None
    return Pictures(map(encode_png, held.images.numpy()), len(held), labels)


@dataclass(frozen=True)
class Converter:
    """The work of one process: names of image files to PNGs."""

    members: Members
    resolution: int
    channels: int
    transform: str

    def __call__(self, names: list[str]) -> list[bytes]:
        """Crop and resize these images."""
        return [self._convert(name) for name in names]

    def _convert(self, name: str) -> bytes:
        return encode_png(self.pixels(name))

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """One image as bytes (channels, resolution, resolution)."""
        raw = self.members.read(name, MAX_BYTES)
        with reading(self.members.where(name), "image"):
            return decode_image(io.BytesIO(raw), self.resolution, self.channels, self.transform)


class Reader(Converter):
    """As `Converter`, to bytes (n, channels, resolution, resolution)."""

    def __call__(self, names: list[str]) -> NDArray[np.uint8]:  # type: ignore[override]
        """Crop and resize these images."""
        return np.stack([self.pixels(name) for name in names])


def from_files(args: Any, official: Official) -> Pictures:
    """Image files in a folder or a zip: those whose names belong to the data set, in the order of their names."""
    members, names, labels = found_in(args, official)
    pngs = (png for some in converted(args, Converter, members, names) for png in some)
    return Pictures(pngs, len(names), labels)


def pixels(args: Any, members: Members, names: list[str]) -> Iterator[NDArray[np.uint8]]:
    """These files' images as bytes (n, channels, resolution, resolution), some at a time."""
    return converted(args, Reader, members, names)


def converted(args: Any, how: type[Converter], members: Members, names: list[str]) -> Iterator[Any]:
    """What a converter makes of these files, some at a time, by as many processes as are told or sensible."""
    tasks = [names[first : first + CHUNK] for first in range(0, len(names), CHUNK)]
    workers = args.workers or sensible_workers(len(names), FILES_A_WORKER)
    return in_order(how(members, args.resolution, args.channels, args.transform), tasks, workers)


def found_in(args: Any, official: Official) -> Files:
    """The files whose names belong to the data set, in the order of their names."""
    what = official.file or "a folder or a zip of images"
    members = members_of(only(sources(args, official)), "--source", what)
    if official.latents and LABELS in members.sizes:
        return in_archive(members, args.labels)
    found = [(name, re.search(official.pattern, name)) for name in members.named(*SUFFIXES)]
    chosen = [
        (name, match) for name, match in found if match and match.groupdict().get("split") in (None, args.split, *whole(args))
    ]
    members.require(bool(chosen), f"holds no image of {args.what}; it must be {what}")
    names = [name for name, _ in chosen]
    return Files(members, names, classes(members, [(name, match["label"]) for name, match in chosen]) if args.labels else None)


def in_archive(members: Members, labelled: bool) -> Files:
    """The PNGs of an archive in EDM's format, with the classes of its dataset.json."""
    names = members.named(".png")
    members.require(bool(names), "holds no PNG")
    labels = read_labels(members, names) if labelled else None
    members.require(labels is not None or not labelled, f"its {LABELS} has no labels; see --no-labels")
    return Files(members, names, None if labels is None else labels.tolist())


def whole(args: Any) -> tuple[str, ...]:
    """The splits that `all` means."""
    return ("train", "test") if args.split == "all" else ()


def classes(members: Members, named: list[tuple[str, str | None]]) -> list[int]:
    """The number of each name's class among the sorted classes."""
    stray = next((name for name, label in named if label is None), None)
    members.require(stray is None, f"{stray} lies in none of the sub-folders, which are the classes")
    number = {label: index for index, label in enumerate(sorted({str(label) for _, label in named}))}
    members.require(len(number) > 1, f"holds one sub-folder only, {next(iter(number))}: no classes; see --no-labels")
    return [number[str(label)] for _, label in named]


def from_imagenet(args: Any, official: Official) -> Pictures:
    """ImageNet's folders, or the official downsampled batches (Chrabaszcz et al. 2017), .npz files in one or several places."""
    paths = sources(args, official)
    places = [members_of(path, "--source", official.file) for path in paths]
    found = [(int(match[1]), place, name) for place in places for name in place.sizes if (match := BATCH.search(name))]
    if not found:
        return from_files(args, official)
    batches = [Batch(place, name, args.resolution) for _, place, name in sorted(found, key=lambda batch: batch[0])]
    labels = [label for batch in batches for label in batch.labels()]
    print("classes are numbered as the downsampled archives have it, not by sorted folders as in EDM's zip")
    pngs = (encode_png(image) for batch in batches for image in batch.images())
    return Pictures(pngs, len(labels), labels if args.labels else None)


@dataclass(frozen=True)
class Batch:
    """One .npz of the downsampled ImageNet: data, bytes (n, 3 * resolution^2), plane by plane, and labels, 1 to 1000."""

    members: Members
    name: str
    resolution: int

    def labels(self) -> list[int]:
        """Classes from 0."""
        labels = self._array("labels")
        whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and len(labels) > 0
        fits = whole and labels.min() >= 1 and labels.max() <= DOWNSAMPLED_CLASSES
        self.members.require(bool(fits), f"its labels must be whole numbers from 1 to {DOWNSAMPLED_CLASSES}", self.name)
        return (labels - 1).tolist()

    def images(self) -> NDArray[np.uint8]:
        """Bytes (n, 3, resolution, resolution)."""
        data, width = self._array("data"), 3 * self.resolution**2
        fits = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == width
        wanted = f"must be bytes of shape (n, {width}) for --resolution={self.resolution}"
        says = f"its data are {data.dtype} of shape {data.shape}, {wanted}"
        self.members.require(fits and len(data) == len(self._array("labels")), says, self.name)
        return data.reshape(-1, 3, self.resolution, self.resolution)

    def _array(self, key: str) -> NDArray[Any]:
        self.members.require(self.name.endswith(".npz"), "a pickled batch: fetch the archives with npz in their names", self.name)
        named = reading(self.members.where(self.name), "batch of arrays")
        with named, self.members.open(self.name) as file, contextlib.closing(np.load(file, allow_pickle=False)) as arrays:
            return arrays[key]


READERS: dict[str, Callable[[Any, Official], Pictures]] = {"cifar10": from_cifar, "imagenet64": from_imagenet}
