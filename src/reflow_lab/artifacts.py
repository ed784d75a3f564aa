"""Folders named by what they are made from, so that a repeated command resumes or returns at once.

A stage (train, pairs, evaluate) describes its result by a recipe: the configuration keys that change it, the hashes of
its inputs and a version that a change of meaning increments. The folder's name is the hash of that recipe; `done.json`,
written last, holds the checksum of every file in it.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import reflow_lab

from .errors import UserError
from .parallel import rank

HASHED = 256 * 2**20  #: bytes of a folder that are read when it is opened, smallest files first: the rest is checked by size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  #: no room on the disk, in the quota, under the file size limit
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  #: a file system without locks


class DiskFull(UserError):
    """There is no room to write a file."""


def digest(recipe: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, sync, rename: the file is there whole or not at all. Its mode is a new file's, whoever writes."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files of its own, which only their owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"{error.strerror}; what was written before stays good, and the same command goes on from there"
        raise DiskFull(f"{path}: cannot be written: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n"))


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a user's error that names it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file; yields whether we have it, which without `wait` may be no.

    The system frees the lock of a process that died. Where the file system has no locks everyone is let in: work is then done
    twice, but what is renamed into place is whole all the same.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield True


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files that processes of this machine left behind when they were killed."""
    for path in folder.glob(pattern):
        name, _, process = path.name.removesuffix(".tmp").rpartition(".")
        if name.endswith(f".{platform.node()}") and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _checksums(mark: Path) -> list[tuple[str, int, str]]:
    try:
        found = [(name, size, checksum) for name, (size, checksum) in read_json(mark)["files"].items()]
        if not all(isinstance(size, int) and isinstance(checksum, str) for _, size, checksum in found):
            raise TypeError
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{mark}: not a done-mark; delete {mark.parent} to make it again") from None


@functools.cache
def warn_of_version(folder: Path) -> None:
    """Say once on stderr if another version of reflow_lab made a finished folder: it is used all the same."""
    path = folder / "version.json"
    made_by = read_json(path)["reflow_lab"] if path.exists() else reflow_lab.__version__
    if made_by != reflow_lab.__version__:
        what = f"made by reflow_lab {made_by}, used by {reflow_lab.__version__}"
        print(f"{folder}: {what}; delete it to make it again", file=sys.stderr)


@dataclass(frozen=True)
class Artifact:
    """One stage's result: `folder` = outputs / stage / hash of the recipe."""

    folder: Path
    recipe: dict[str, Any]

    @property
    def key(self) -> str:
        """The recipe's hash, by which later stages name this one."""
        return digest(self.recipe)

    def is_done(self) -> bool:
        """Whether the folder is finished; raises a `UserError` if a finished one no longer matches its checksums."""
        mark = self.folder / "done.json"
        if not mark.exists():
            return False
        read = 0
        for name, size, checksum in sorted(_checksums(mark), key=lambda file: file[1]):
            path = self.folder / name
            fits = path.exists() and path.stat().st_size == size
            read += size
            if not fits or (read <= HASHED and file_hash(path) != checksum):
                raise UserError(f"{path}: is missing or was changed after it was written; delete {self.folder} to make it again")
        warn_of_version(self.folder)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, waiting for another process that has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        with lock(path, wait=False) as mine:
            if mine:
                yield
                return
        if rank() == 0:
            print(f"waiting for another process that works on {self.folder}")
        with lock(path):
            yield

    def begin(self) -> None:
        """Write the recipe and the code's version into the folder, whose lock we hold; a folder of another recipe is refused."""
        self.require_recipe()
        remove_leftovers(self.folder, ".*.json.*.tmp")
        write_json(self.folder / "recipe.json", self.recipe)
        write_json(self.folder / "version.json", {"reflow_lab": reflow_lab.__version__})

    def require_recipe(self) -> None:
        """Raise a `UserError` that names the differing keys if the folder holds something made by another recipe."""
        path = self.folder / "recipe.json"
        if path.exists() and (differing := differences(read_json(path), self.recipe)):
            raise UserError(f"{self.folder}: holds something else: {differing}; choose another folder, or delete it")

    def finish(self, known: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the done-mark: from now on the folder is whole. `known`: checksums of files that need not be read again."""
        found = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        names = [str(p.relative_to(self.folder)) for p in found if not p.name.startswith(".") and p.name != "done.json"]
        files = {n: ((self.folder / n).stat().st_size, known.get(n) or file_hash(self.folder / n)) for n in names}
        write_json(self.folder / "done.json", {"key": self.key, "files": files})


def differences(there: Any, wanted: Any, name: str = "") -> str:
    """Where two recipes differ: `key: value in the first, value in the second`, empty if they are equal."""
    if not (isinstance(there, dict) and isinstance(wanted, dict)):
        return "" if there == wanted else f"{name}: {there} there, {wanted} here"
    inner = [differences(there.get(key), wanted.get(key), f"{name}.{key}".lstrip(".")) for key in sorted({*there, *wanted})]
    return "; ".join(found for found in inner if found)


def artifact(outputs: str | Path, stage: str, version: int, **recipe: Any) -> Artifact:
    """The artifact of a stage; `version` is the stage's recipe version."""
    described = {"stage": stage, "version": version, **recipe}
    return Artifact(Path(outputs) / stage / digest(described), described)
