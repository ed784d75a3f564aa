"""CIFAR-10 (Krizhevsky 2009) from the original archive, its extracted batches, or WebP sheets. No file is executed."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import bad_value, require
from ..noise import permutation
from .sets import ImageSet
from .sources import SPLIT_SEED, reading, require_facts, require_split

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
SIDE, CLASSES = 32, 10
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
MAX_BATCH_BYTES = 64 << 20  # an original batch has 31 MB

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  #: images (n, 3, 32, 32) and labels (n,)


@dataclass
class CIFAR10:
    """Colour images, 32 px, 10 classes: train and reference are the 50,000 training images, floor the 10,000 test images.

    The reference is the training set because FID on CIFAR-10 is by convention measured against it; so, unlike elsewhere,
    `train` and `reference` are one and the same set, and memorised images would score well.

    source=archive: `path` is cifar-10-python.tar.gz, whose MD5 is compared with the original's unless `check_md5` is
    false, or a folder of its extracted batches (never compared).
    source=sheets: `path` is a folder with one lossless sheet per split and class, `train_0_airplane.webp` etc., 32x32
    tiles row by row. Sheets are sorted by class, so their images are shuffled, always in the same way.
    """

    path: str
    source: str = "archive"
    check_md5: bool = True
    channels: int = 3
    resolution: int = SIDE
    num_classes: int = CLASSES

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", self.path, f"must name the archive {URL}, its folder, or a folder of sheets")
        require(self.source in ("archive", "sheets"), "data.source", self.source, "must be archive or sheets")
        require_facts("CIFAR-10", vars(self), {"channels": 3, "resolution": SIDE, "num_classes": CLASSES})

    def split(self, name: str) -> ImageSet:
        """The split `train`, `reference` (the same) or `floor`: uint8 (n, 3, 32, 32)."""
        require_split(name)
        return self._test if name == "floor" else self._train

    @cached_property
    def _train(self) -> ImageSet:
        return self._load("train")

    @cached_property
    def _test(self) -> ImageSet:
        return self._load("test")

    def _load(self, part: str) -> ImageSet:
        path = Path(self.path).expanduser()
        images, labels = self._read_sheets(path, part) if self.source == "sheets" else self._read_batches(path, part)
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), f"cifar10/{part}")

    def _read_sheets(self, path: Path, part: str) -> Labelled:
        require(path.is_dir(), "data.path", self.path, "no such folder; it must hold the sheets train_0_airplane.webp etc.")
        images, labels = _join(read_sheet(_find_sheet(path, f"{part}_{label}"), label) for label in range(CLASSES))
        order = permutation(SPLIT_SEED, f"cifar10/{part}", len(images))
        return images[order], labels[order]

    def _read_batches(self, path: Path, part: str) -> Labelled:
        advice = f"no such file or folder; fetch {URL} and put it at {path.absolute()}, or set data.path to where it is"
        require(path.exists(), "data.path", self.path, advice)
        with reading(f"data.path={self.path}", "copy of cifar-10-python.tar.gz"):
            raw = _batches_in_folder(path, BATCHES[part]) if path.is_dir() else self._batches_in_archive(path, BATCHES[part])
        missing = [name for name in BATCHES[part] if name not in raw]
        require(
            not missing,
            "data.path",
            self.path,
            f"holds no {', '.join(missing)}; it must be {URL}, its folder, or with data.source=sheets sheets",
        )
        return _join(self._decode(name, raw[name]) for name in BATCHES[part])

    def _batches_in_archive(self, path: Path, names: Iterable[str]) -> dict[str, bytes]:
        if self.check_md5:
            require_original(path)
        with tarfile.open(path, "r:gz") as archive:
            found = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}
            return {name: _member_bytes(archive, found[name]) for name in names if name in found}

    def _decode(self, name: str, raw: bytes) -> Labelled:
        with reading(f"data.path={self.path}: {name}", "batch of CIFAR-10"):
            return decode_batch(raw)


def require_original(path: Path, key: str = "data.path", otherwise: str = "set data.check_md5=false") -> None:
    """Raise a `UserError` unless the file has the MD5 of the archive that its authors publish."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    problem = f"its MD5 is {found}, the original's {MD5}: fetch {URL} anew, or {otherwise} for another archive"
    require(found == MD5, key, path, problem)


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None or member.size > MAX_BATCH_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes, at most {MAX_BATCH_BYTES:,} are read")
    return file.read()


def _batches_in_folder(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    inner = path / "cifar-10-batches-py"
    root = inner if inner.is_dir() else path
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def _join(parts: Iterable[Labelled]) -> Labelled:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def decode_batch(raw: bytes) -> Labelled:
    """A pickled batch as images and labels; ValueError or UnpicklingError for anything else."""
    content = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    if not isinstance(content, dict):
        raise ValueError(f"a batch is a dictionary, not a {type(content).__name__}")
    data, labels = (content.get(key, content.get(key.decode())) for key in (b"data", b"labels"))
    if not isinstance(data, _Array) or data.values.shape[1:] != (3 * SIDE * SIDE,) or not isinstance(labels, list):
        raise ValueError("it needs `data`, bytes of shape (n, 3072), and `labels`, a list")
    return data.values.reshape(-1, 3, SIDE, SIDE), _checked_labels(labels, len(data.values))


def _checked_labels(labels: list[Any], num_images: int) -> NDArray[np.int64]:
    if len(labels) != num_images:
        raise ValueError(f"{len(labels):,} labels for {num_images:,} images")
    if any(type(label) is not int or not 0 <= label < CLASSES for label in labels):
        raise ValueError(f"labels must be whole numbers from 0 to {CLASSES - 1}")
    return np.array(labels, np.int64)


class _Array:
    """Takes the place of numpy.ndarray in a pickle, so that not even NumPy's own reconstruction runs on foreign values."""

    values: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, fortran, raw = state
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Bytes:
    """Takes the place of numpy.dtype: bytes are the only type."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, only bytes are read")

    def __setstate__(self, state: object) -> None: ...


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays of bytes, numbers, strings and plain containers, and refuses every other name."""

    allowed: dict[str, Any] = {  # noqa: RUF012 (never changed)
        "numpy.core.multiarray._reconstruct": _reconstruct,
        "numpy._core.multiarray._reconstruct": _reconstruct,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Bytes,
        "_codecs.encode": _latin1,  # how Python 3 writes bytes into Python 2's protocol
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no use for")
        return self.allowed[f"{module}.{name}"]


def _find_sheet(folder: Path, prefix: str) -> Path:
    found = sorted(folder.glob(f"{prefix}_*.webp"))
    if len(found) != 1:
        raise bad_value("data.path", folder, f"holds {len(found)} files {prefix}_*.webp, must be exactly one")
    return found[0]


def read_sheet(path: Path, label: int) -> Labelled:
    """The 32x32 tiles of one sheet, row by row, all with the same label."""
    with reading(f"data.path={path}", "sheet of 32x32 images"):
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
        height, width = sheet.shape[:2]
        if height % SIDE or width % SIDE:
            raise ValueError(f"{width}x{height} pixels are not whole tiles of {SIDE}x{SIDE}")
        tiles = sheet.reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3).transpose(0, 2, 4, 1, 3)
        images = tiles.reshape(-1, 3, SIDE, SIDE)
        return images, np.full(len(images), label, np.int64)
