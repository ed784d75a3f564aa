"""Latents of images in a folder, as `Latents` reads them: the work of `reflow-lab data imagenet512`.

    recipe.json     what they were made of: images, autoencoder (by its weights), sizes, classes
    latents.npy     mean and standard deviation of each latent, float16 (n, 2c, h, w), in random order
    labels.npy      classes, int64 (n,), where there are some
    originals.npy   the first images themselves, bytes (k, 3, 8h, 8w): what distances are measured against

An interrupted command goes on from where it was last saved.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifacts import FULL, Artifact, read_json, write_atomically, write_json
from ..errors import UserError, require
from ..noise import permutation
from ..progress import Bar
from . import autoencoder
from .latents import STAGE
from .official import Official
from .sources import require_room
from .zips import Files

VERSION = 1  #: of the recipe: increment when the same images give other latents
ORIGINALS = 10_000  #: images that are kept, 8 GB at 512 pixels: as many as an evaluation compares by default
SAVE_EVERY = 2048  #: images: 130 MB of latents at 512 pixels
PROGRESS = ".progress.json"
Read = Callable[[list[str]], Iterator[NDArray[np.uint8]]]


def add_words(add: Callable[..., Any]) -> None:
    """The words that only latents have."""
    default = f"default: {autoencoder.STABLE_DIFFUSION}, which is downloaded"
    add("--autoencoder", metavar="PATH", help=f"a folder in diffusers' format, or a name on the Hugging Face hub ({default})")
    add("--originals", type=int, metavar="N", help=f"images to keep, for distances (default: {ORIGINALS:,})")
    add("--batch-size", type=int, metavar="N", help=f"images that are encoded at a time (default: {autoencoder.BATCH})")


def settle(args: Any, official: Official) -> None:
    """Put defaults where nothing is said; words of latents are refused elsewhere."""
    own = {"autoencoder": autoencoder.STABLE_DIFFUSION, "originals": ORIGINALS, "batch_size": autoencoder.BATCH}
    for name, default in own.items():
        given, word = getattr(args, name), f"--{name.replace('_', '-')}"
        require(given is None or official.latents, word, given, "is for imagenet512, of which latents are made")
        low = 0 if name == "originals" else 1
        require(not isinstance(given, int) or given >= low, word, given, f"must be at least {low}")
        setattr(args, name, default if given is None else given)


def make(args: Any, found: Files, read: Read) -> str:
    """Encode the images, or go on with it, or return at once if it is done; what was made, in words."""
    model = autoencoder.load(args.autoencoder, "--autoencoder")
    made = Artifact(args.out, recipe(args, found, model))
    fresh = not args.out.exists() or (args.out.is_dir() and not [p for p in args.out.iterdir() if not p.name.startswith(".")])
    require(fresh or (args.out / "recipe.json").exists(), "--out", args.out, "is there already and holds something else")
    made.require_recipe()
    if not made.is_done():
        with made.locked(), full_disk(made.folder):
            if not made.is_done():  # by another process, for which we waited
                fill(made, args, found, read, model.to("cuda" if torch.cuda.is_available() else "cpu"))
    return words(made)


def recipe(args: Any, found: Files, model: Any) -> dict[str, Any]:
    """What the files depend on. Raises a `UserError` where the autoencoder takes no such images."""
    factor, channels = autoencoder.factor(model), int(model.config.latent_channels)
    cuts = f"is no multiple of {factor}, the pixels of one latent"
    require(args.resolution % factor == 0, "--resolution", args.resolution, cuts)
    rgb = int(model.config.in_channels) == int(model.config.out_channels) == 3
    require(rgb, "--autoencoder", args.autoencoder, f"takes images of {model.config.in_channels} channels, wanted is RGB")
    side = args.resolution // factor
    return {
        "stage": STAGE,
        "version": VERSION,
        "images": found.members.fingerprint(),
        "transform": args.transform,
        "resolution": args.resolution,
        "autoencoder": autoencoder.weights_hash(model),
        "shape": [channels, side, side],
        "count": len(found.names),
        "originals": min(args.originals, len(found.names)),
        "num_classes": 0 if found.labels is None else 1 + max(found.labels),
    }


def fill(made: Artifact, args: Any, found: Files, read: Read, model: Any) -> None:
    """All files of the folder, whose lock we hold."""
    about, folder = made.recipe, made.folder
    channels, *sides = about["shape"]
    latents = Growing(folder / "latents.npy", (about["count"], 2 * channels, *sides), "float16")
    originals = Growing(folder / "originals.npy", (about["originals"], 3, args.resolution, args.resolution), "uint8")
    if not (folder / PROGRESS).exists():
        require_room(folder, latents.nbytes + originals.nbytes, "--out", "for latents and originals")
    made.begin()
    order = permutation(0, STAGE, about["count"])
    encode_all(folder, [found.names[row] for row in order], read, partial(encode, model, args.batch_size), latents, originals)
    if found.labels is not None:
        labels = np.array(found.labels, np.int64)[order]
        write_atomically(folder / "labels.npy", lambda path: save(path, labels))
    for file in (latents, originals):
        file.finish()
    made.finish()
    (folder / PROGRESS).unlink(missing_ok=True)


def encode(model: Any, batch_size: int, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Means and standard deviations of some images; raises a `UserError` where they are not finite."""
    batches = torch.split(torch.from_numpy(images), batch_size)
    found: Tensor = torch.cat([autoencoder.moments(model, batch.to(model.device)).half().cpu() for batch in batches])
    require(bool(found.isfinite().all()), "--autoencoder", "latents", "has NaN or infinite latents, or some beyond float16")
    return found.numpy()


def encode_all(
    folder: Path,
    names: list[str],
    read: Read,
    latents_of: Callable[[NDArray[np.uint8]], NDArray[np.float16]],
    latents: "Growing",
    originals: "Growing",
) -> None:
    """Both files, from the row that was saved last; what is done is saved every SAVE_EVERY images, and when interrupted."""
    path = folder / PROGRESS
    row = saved = read_json(path)["row"] if path.exists() else 0
    kept = originals.shape[0]
    with latents.opened(row) as ours, originals.opened(min(row, kept)) as theirs, Bar("encode", len(names), "images", row) as bar:

        def save_progress() -> None:
            for file in (ours, theirs):
                file.flush()
                os.fsync(file.fileno())
            write_json(path, {"row": row})

        try:
            for images in read(names[row:]):
                ours.write(latents_of(images).tobytes())
                theirs.write(images[: max(kept - row, 0)].tobytes())
                row += len(images)
                bar.advance(len(images))
                if row - saved >= SAVE_EVERY:
                    save_progress()
                    saved = row
        finally:
            save_progress()


class Growing:
    """An .npy file of known shape that is written row by row under a hidden name, and can be continued at a row."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.hidden = path.with_name(f".{path.name}")

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @contextmanager
    def opened(self, row: int) -> Iterator[BinaryIO]:
        """To write from this row on; what lies behind it is forgotten. Raises a `UserError` where there are not so many rows."""
        if self.path.exists():  # it had its name already, when the command was ended
            self.path.replace(self.hidden)
        self.hidden.touch()
        with self.hidden.open("r+b") as file:
            kind = np.lib.format.dtype_to_descr(self.dtype)
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": self.shape})
            end = file.tell() + row * self.nbytes // max(self.shape[0], 1)
            lost = f"is shorter than what was saved; delete {self.path.parent} to begin again"
            require(file.seek(0, os.SEEK_END) >= end, "--out", self.hidden, lost)
            file.truncate(end)
            file.seek(end)
            yield file

    def finish(self) -> None:
        """Give it its name."""
        self.hidden.replace(self.path)


def save(path: Path, array: NDArray[Any]) -> None:
    """An .npy file under any name."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Say a full disk in a line: what was saved stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"--out={folder}: {error.strerror}; the same command goes on from what was saved") from None


def words(made: Artifact) -> str:
    """What there is now, and how to train on it."""
    about, folder = made.recipe, made.folder
    size, classes = "x".join(map(str, about["shape"])), about["num_classes"]
    keys = {"path": folder, "channels": about["shape"][0], "resolution": about["shape"][1], "num_classes": classes}
    given = " ".join(f"data.{key}={value}" for key, value in keys.items())
    return "\n".join(
        [
            f"{folder}: {about['count']:,} latents of {size}, {classes or 'no'} classes, {about['originals']:,} original images",
            f"reflow-lab train experiment=imagenet512_base {given}",
        ]
    )
