"""A folder of one's own images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import bad_value, require
from .sets import ImageSet
from .sources import partition, reading, require_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}


@dataclass
class Folder:
    """Images under `path`, at any depth: the central square of each, resized (Lanczos), grey or RGB by `channels`.

    num_classes = 0: unlabelled. Otherwise `path` holds so many sub-folders, whose sorted names are the classes 0, 1, ...
    train is a random `train_fraction` of the images (rounded down), floor the rest, and reference is train: one's own
    images are often too few to keep a third part. Transparent pixels are laid on white, 16-bit grey loses its low byte,
    a camera's orientation mark is obeyed.
    """

    path: str | None
    resolution: int = 32
    channels: int = 3
    num_classes: int = 0
    train_fraction: float = 0.8

    def __post_init__(self) -> None:
        require(isinstance(self.resolution, int) and self.resolution > 0, "data.resolution", self.resolution, "must be 1 or more")
        require(self.channels in MODES, "data.channels", self.channels, "must be 1 (grey) or 3 (RGB)")
        whole = isinstance(self.num_classes, int) and self.num_classes >= 0
        require(whole, "data.num_classes", self.num_classes, "must be the number of sub-folders, or 0 for no labels")
        share = isinstance(self.train_fraction, float) and 0 < self.train_fraction < 1
        require(share, "data.train_fraction", self.train_fraction, "must be between 0 and 1")

    def split(self, name: str) -> ImageSet:
        """The split `train`, `reference` (the same) or `floor`: uint8 (n, channels, resolution, resolution)."""
        require_split(name)
        return self._splits["floor" if name == "floor" else "train"]

    @cached_property
    def _splits(self) -> dict[str, ImageSet]:
        root = self._root()
        files = image_files(root)
        labels = self._labels(root, files) if self.num_classes else None
        fractions = (self.train_fraction, 1 - self.train_fraction)
        parts = partition(np.zeros(len(files), np.int64), fractions, "folder")
        enough = all(len(part) for part in parts)
        require(
            enough, "data.path", self.path, f"{len(files)} images cannot be split into {fractions[0]:g} and the rest, add some"
        )
        images = np.stack([read_image(file, self.resolution, self.channels) for file in files])
        return {name: _image_set(images, labels, part, name) for name, part in zip(("train", "floor"), parts, strict=True)}

    def _root(self) -> Path:
        if self.path is None:
            raise bad_value("data.path", "null", "must name the folder of your images")
        root = Path(self.path).expanduser()
        require(root.is_dir(), "data.path", self.path, f"no such folder ({root.absolute()}); it must hold your images")
        return root

    def _labels(self, root: Path, files: list[Path]) -> NDArray[np.int64]:
        tops = [file.relative_to(root).parts for file in files]
        stray = next((file for file, parts in zip(files, tops, strict=True) if len(parts) == 1), None)
        if stray is not None:
            raise bad_value(
                "data.path", stray, f"lies in none of the sub-folders, the classes of data.num_classes={self.num_classes}"
            )
        names, labels = np.unique([parts[0] for parts in tops], return_inverse=True)
        fits = len(names) == self.num_classes
        require(fits, "data.num_classes", self.num_classes, f"{self.path} has {len(names)} sub-folders with images")
        return labels.astype(np.int64)


def _image_set(images: NDArray[np.uint8], labels: NDArray[np.int64] | None, part: NDArray[np.int64], name: str) -> ImageSet:
    return ImageSet(torch.from_numpy(images[part]), None if labels is None else torch.from_numpy(labels[part]), f"folder/{name}")


def image_files(root: Path) -> list[Path]:
    """The visible image files under a folder, in the order of their relative paths; a `UserError` if there are none."""
    inside = {file.relative_to(root): file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()}
    found = [file for relative, file in sorted(inside.items()) if not any(part.startswith(".") for part in relative.parts)]
    require(bool(found), "data.path", root, f"holds no image; wanted are files ending in {', '.join(SUFFIXES)}")
    return found


def read_image(file: Path, resolution: int, channels: int) -> NDArray[np.uint8]:
    """One image as bytes (channels, resolution, resolution); a `UserError` that names a file which cannot be decoded."""
    with reading(f"data.path={file}", "image"), Image.open(file) as opened:
        image = _opaque(ImageOps.exif_transpose(opened)).convert(MODES[channels])
        pixels = np.asarray(_square(image).resize((resolution, resolution), Image.Resampling.LANCZOS))
    return pixels.reshape(resolution, resolution, channels).transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """Without transparency or 16-bit values, which Pillow's own conversion would uncover or clip to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
