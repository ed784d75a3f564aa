"""Work on many small files, spread over processes, with its results in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ..errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  #: of a worker process


def sensible_workers(num_files: int, enough: int) -> int:
    """A process for every `enough` files, at most one a core: fewer are done by the time that another one has started."""
    return max(1, min(cores(), num_files // enough))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """work(task) of every task, in the tasks' order; with one worker in this process, else in so many others.

    `work` is handed to each process once, so it may be heavy; two results a process wait at most.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,)) as pool:
        try:
            yield from _results(pool, tasks, 2 * workers)
        except BrokenProcessPool:
            raise UserError("a worker process ended before its time, perhaps for want of memory: try fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: Iterable[Any], num_ahead: int) -> Iterator[Any]:
    ahead: deque[Future[Any]] = deque()
    for task in tasks:
        ahead.append(pool.submit(_do, task))
        if len(ahead) > num_ahead:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches every process: the first one ends the others


def _do(task: Any) -> Any:
    return _work(task)
