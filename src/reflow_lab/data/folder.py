"""A folder of one's own images."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import bad_value, require
from .sets import ImageSet
from .sources import partition, reading, require_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}
MAX_PIXELS = 2**26  #: larger images are refused before they are decoded; ImageNet's largest has 61 million


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
    with reading(f"data.path={file}", "image"):
        return decode_image(file, resolution, channels)


def decode_image(source: Path | BinaryIO, resolution: int, channels: int, transform: str = "center-crop") -> NDArray[np.uint8]:
    """An image file as bytes (channels, resolution, resolution) by one of TRANSFORMS; ValueError beyond MAX_PIXELS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is above ours
        opened = Image.open(source)
    with opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height}, at most {MAX_PIXELS:,} pixels are read")
        pixels = np.asarray(TRANSFORMS[transform](opened, MODES[channels], resolution))
    return pixels.reshape(resolution, resolution, channels).transpose(2, 0, 1)


def centre_crop(image: Image.Image, mode: str, resolution: int) -> Image.Image:
    """The upright image's central square, resized by Lanczos."""
    upright = _opaque(ImageOps.exif_transpose(image)).convert(mode)
    return _square(upright).resize((resolution, resolution), Image.Resampling.LANCZOS)


def centre_crop_dhariwal(image: Image.Image, mode: str, resolution: int) -> Image.Image:
    """As ADM treats ImageNet (Dhariwal and Nichol 2021): halved by 2x2 means while twice too large, resized bicubic, cropped.

    Orientation marks are not obeyed, as they are not there.
    """
    plain = _opaque(image).convert(mode)
    while min(plain.size) >= 2 * resolution:
        plain = plain.resize((plain.width // 2, plain.height // 2), Image.Resampling.BOX)
    scale = resolution / min(plain.size)
    plain = plain.resize((round(plain.width * scale), round(plain.height * scale)), Image.Resampling.BICUBIC)
    left, top = (plain.width - resolution) // 2, (plain.height - resolution) // 2
    return plain.crop((left, top, left + resolution, top + resolution))


TRANSFORMS = {"center-crop": centre_crop, "center-crop-dhariwal": centre_crop_dhariwal}  #: by EDM's and EDM2's names


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
