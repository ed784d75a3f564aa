"""Folders named by what they are made from, so that a repeated command resumes or returns at once.

A stage (train, pairs, evaluate) describes its result by a recipe: the configuration keys that change it, the hashes of
its inputs and a version that a change of meaning increments. The folder's name is the hash of that recipe; `done.json`,
written last, holds the checksum of every file in it.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reflow_lab

from .errors import UserError

HASHED_BELOW = 64 * 2**20  #: larger files are checked by size when a folder is opened: reading them would take seconds


def digest(recipe: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, sync, rename: the file is there whole or not at all. Its mode is a new file's, whoever writes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files of its own, which only their owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
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
        return self.folder.name

    def is_done(self) -> bool:
        """Whether the folder is finished; raises a `UserError` if a finished one no longer matches its checksums."""
        mark = self.folder / "done.json"
        if not mark.exists():
            return False
        for name, size, checksum in _checksums(mark):
            path = self.folder / name
            fits = path.exists() and path.stat().st_size == size
            if not fits or (size < HASHED_BELOW and file_hash(path) != checksum):
                raise UserError(f"{path}: is missing or was changed after it was written; delete {self.folder} to make it again")
        warn_of_version(self.folder)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, waiting for another process that has it; the system frees a dead process's lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that works on {self.folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def begin(self) -> None:
        """Write the recipe and the code's version into the folder."""
        write_json(self.folder / "recipe.json", self.recipe)
        write_json(self.folder / "version.json", {"reflow_lab": reflow_lab.__version__})

    def finish(self) -> None:
        """Write the done-mark: from now on the folder is whole."""
        found = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        paths = [p for p in found if not p.name.startswith(".") and p.name != "done.json"]
        files = {str(p.relative_to(self.folder)): (p.stat().st_size, file_hash(p)) for p in paths}
        write_json(self.folder / "done.json", {"key": self.key, "files": files})


def artifact(outputs: str | Path, stage: str, version: int, **recipe: Any) -> Artifact:
    """The artifact of a stage; `version` is the stage's recipe version."""
    described = {"stage": stage, "version": version, **recipe}
    return Artifact(Path(outputs) / stage / digest(described), described)
