"""Progress bars for people, plain lines for logs; of several processes the first one speaks."""

import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .parallel import rank

LINE_EVERY_S = 30.0  #: without a terminal, how often a line is printed


class RateColumn(ProgressColumn):
    """Items a second."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        """See rich."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else f"-- {self.unit}/s")


class Bar:
    """A bar that counts `unit`s up to `total`; a context manager. `note` is shown at its right end."""

    def __init__(self, description: str, total: int, unit: str, completed: int = 0) -> None:
        self.console = Console(stderr=True)
        done = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(unit), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*done, *left, console=self.console)
        self.description, self.total, self.unit = description, total, unit
        self.task = self.progress.add_task(description, total=total, completed=completed, note="")
        self.completed = self.start_count = completed
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> "Bar":
        if self.console.is_terminal and rank() == 0:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()
        else:
            self._line()

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more items."""
        self.completed += count
        self.progress.update(self.task, advance=count, note=note)
        if not self.console.is_terminal and time.monotonic() - self.printed > LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self.printed = time.monotonic()
        if rank() > 0:
            return
        speed = (self.completed - self.start_count) / max(self.printed - self.started, 1e-9)
        left = (self.total - self.completed) / speed if speed else float("inf")
        text = f"{self.description}: {self.completed:,}/{self.total:,}, {speed:,.0f} {self.unit}/s, {left:,.0f} s left"
        print(text, file=sys.stderr, flush=True)


def track(counts: Iterable[int], description: str, total: int, unit: str, completed: int = 0) -> Iterator[int]:
    """Pass counts through while a bar adds them up."""
    with Bar(description, total, unit, completed) as bar:
        for count in counts:
            bar.advance(count)
            yield count
