"""EDM's archives as files: a zip or a folder of PNGs and dataset.json, read by name and written byte for byte the same.

EDM's dataset tool stores uncompressed PNGs under names like 00000/img00000000.png, and dataset.json with
{"labels": [[name, class], ...]} or {"labels": null}; nothing more is needed to read them.
"""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, require
from .sources import reading

LABELS = "dataset.json"
MAX_LABELS_BYTES = 1 << 30  #: of dataset.json; ImageNet's has 42 MB
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZIP = "zip archive: it is something else, or was cut short"
COLOURS = {1: 0, 3: 2}  #: channels -> PNG's colour type


class Members(ABC):
    """The files of a zip or a folder by their names, which are relative paths with slashes; errors say `key`=path."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 that changes with any file, found without reading them."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file, to be read at any place."""

    def where(self, name: str) -> str:
        """How an error names a file."""
        return f"{self.key}={self.path}: {name}"

    def require(self, condition: bool, problem: str, name: str = "") -> None:
        """Raise a `UserError` that names the archive, or a file in it, unless the condition holds."""
        if not condition:
            raise UserError(f"{self.where(name)}: {problem}" if name else f"{self.key}={self.path}: {problem}")

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes; a `UserError` that names one that cannot be read."""
        size = self.sizes[name]
        self.require(size <= limit, f"has {size:,} bytes, at most {limit:,} are read", name)
        with reading(self.where(name), "file"), self.open(name) as file:
            return file.read()

    def named(self, *suffixes: str) -> list[str]:
        """The sorted names of visible files with one of these endings, in any case."""
        return sorted(name for name in self.sizes if name.lower().endswith(suffixes) and _is_visible(name))


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


class Files(NamedTuple):
    """Image files of a zip or a folder by name, and a class for each, or None."""

    members: Members
    names: list[str]
    labels: list[int] | None


class ZipMembers(Members):
    """Files in a zip; it is opened at first use, and anew in a process that it is sent to."""

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return ZipMembers, (self.path, self.key)

    @cached_property
    def _file(self) -> zipfile.ZipFile:
        with reading(f"{self.key}={self.path}", ZIP):
            return zipfile.ZipFile(self.path)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """See `Members`."""
        return {info.filename: info.file_size for info in self._file.infolist() if not info.is_dir()}

    def fingerprint(self) -> str:
        """Of the central directory: it holds names, sizes, check sums and dates."""
        with reading(f"{self.key}={self.path}", ZIP), self.path.open("rb") as file:
            return hashlib.sha256(central_directory(file)).hexdigest()

    def open(self, name: str) -> IO[bytes]:
        """See `Members`."""
        return self._file.open(name)


class FolderMembers(Members):
    """Files under a folder."""

    @cached_property
    def _files(self) -> dict[str, os.stat_result]:
        found = {path.relative_to(self.path).as_posix(): path.stat() for path in self.path.rglob("*") if path.is_file()}
        return dict(sorted(found.items()))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """See `Members`."""
        return {name: stat.st_size for name, stat in self._files.items()}

    def fingerprint(self) -> str:
        """Of names, sizes and times of change."""
        known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in self._files.items()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def open(self, name: str) -> IO[bytes]:
        """See `Members`."""
        return (self.path / name).open("rb")


def members_of(path: str | Path, key: str, what: str) -> Members:
    """The files of a zip or a folder; `what` it should be is said where there is none."""
    found = Path(path).expanduser()
    require(found.exists(), key, path, f"no such file or folder ({found.absolute()}); it must be {what}")
    return FolderMembers(found, key) if found.is_dir() else ZipMembers(found, key)


def central_directory(file: IO[bytes]) -> bytes:
    """The raw list of members at a zip's end; ValueError where there is none (APPNOTE.TXT 4.3.12 to 4.3.16)."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 22 - 0xFFFF - 20))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise ValueError("it has no central directory")
    size, offset = struct.unpack_from("<II", tail, end + 12)
    if tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
        size, offset = struct.unpack_from("<QQ", file.read(56), 40)
    file.seek(offset)
    return file.read(size)


def read_labels(members: Members, names: Sequence[str]) -> NDArray[np.int64] | None:
    """The class of every name by dataset.json, int64 (n,), or None where it says null; a `UserError` if they do not fit."""
    with reading(members.where(LABELS), "list of labels"):
        content: Any = json.loads(members.read(LABELS, MAX_LABELS_BYTES))
        pairs = content["labels"]
        if pairs is None:
            return None
        labels = dict(pairs)
    _require_matching(members, names, labels, len(pairs))
    return np.array([labels[name] for name in names], np.int64)


def _require_matching(members: Members, names: Sequence[str], labels: dict[str, Any], num_pairs: int) -> None:
    twice = f", {num_pairs - len(labels):,} of them for a name that has one" if len(labels) < num_pairs else ""
    count = f"{num_pairs:,} labels{twice}, but there are {len(names):,} images"
    members.require(num_pairs == len(labels) == len(names), count, LABELS)
    missing = next((name for name in names if name not in labels), None)
    members.require(missing is None, f"has no label for {missing}", LABELS)
    wrong = next((name for name, label in labels.items() if type(label) is not int or not 0 <= label < 2**31), "")
    says = f"the label of {wrong} is {labels.get(wrong)}, must be a whole number of at least 0"
    members.require(not wrong, says, LABELS)


def member_name(number: int) -> str:
    """Where EDM's tool puts image `number`."""
    return f"{number:08d}"[:5] + f"/img{number:08d}.png"


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """An uncompressed PNG of (channels, h, w) bytes: the same ones whatever zlib and Pillow are installed (RFC 1950, 1951)."""
    channels, height, width = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # filter 0 before every row
    rows[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0)
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", _stored(rows.tobytes())), _chunk(b"IEND", b"")
    return SIGNATURE + b"".join(chunks)


def _stored(raw: bytes) -> bytes:
    starts = range(0, len(raw), 0xFFFF)
    blocks = [(start + 0xFFFF >= len(raw), raw[start : start + 0xFFFF]) for start in starts]
    packed = [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block for last, block in blocks]
    return b"\x78\x01" + b"".join(packed) + struct.pack(">I", zlib.adler32(raw))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def png_size(channels: int, resolution: int) -> int:
    """Bytes of such a PNG, and of what the zip says of it."""
    return len(encode_png(np.zeros((channels, resolution, resolution), np.uint8))) + 200


def write_archive(path: Path, pngs: Iterable[bytes], labels: Sequence[int] | None) -> None:
    """EDM's zip: members stored, without dates, dataset.json last."""
    names: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, png in enumerate(pngs):
            names.append(member_name(number))
            archive.writestr(_dateless(names[-1]), png)
        pairs = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
        archive.writestr(_dateless(LABELS), json.dumps({"labels": pairs}))


def _dateless(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info
