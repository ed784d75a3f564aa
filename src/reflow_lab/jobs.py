"""The jobs of a sweep (`-m`): one that fails does not end the others, and at the end the failed ones are named."""

import contextlib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from .errors import JobsFailed, UserError

KILLED = "a job's process was killed, out of memory perhaps, and joblib then stops the others; the same command goes on"


class Crash(JobsFailed):
    """A job's error that is no mistake of the user's, in one line; its traceback was printed where it happened."""


class Job(NamedTuple):
    """A job that ran, in whatever process: its words, and its result or why it has none."""

    words: list[str]
    result: Any
    error: Exception | None


def crashed(error: Exception) -> Crash:
    """The error of a job in one line, after its traceback."""
    traceback.print_exception(error)
    return Crash(f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextlib.contextmanager
def collected() -> Iterator[list[Job]]:
    """The jobs of the sweep that runs meanwhile, in order; a failed one is listed, where Hydra's sweeper would raise its error.

    Hydra prints a line of its own before it raises a job's error; outside of a sweep a user error is raised alone, since it
    says all in its one line. Raises `JobsFailed` where a killed process took the launcher with it, `UserError` without SLURM.
    """
    from hydra.core.utils import JobReturn, JobStatus

    found: list[Job] = []
    hydras: Any = JobReturn.return_value

    def value(job: Any) -> Any:
        result, failed = job._return_value, job.status == JobStatus.FAILED
        if is_of_sweep(job):
            found.append(Job(list(job.overrides), None, result) if failed else Job(list(job.overrides), result, None))
            return None if failed else result
        if isinstance(result, UserError):
            raise result
        return hydras.fget(job)

    JobReturn.return_value = property(value, hydras.fset)  # type: ignore[method-assign, assignment]
    try:
        _outlive_killed_jobs()
        yield found
    except BrokenProcessPool:
        raise JobsFailed(KILLED) from None
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise UserError("launcher=slurm: there is no srun here; type the command where you type sbatch") from None
    finally:
        JobReturn.return_value = hydras  # type: ignore[method-assign]


def is_of_sweep(job: Any) -> bool:
    """Whether Hydra's own sweeper launched the job: another sweeper looks after its jobs itself."""
    from hydra.types import RunMode

    hydra = job.hydra_cfg.hydra
    return hydra.mode == RunMode.MULTIRUN and hydra.sweeper._target_.endswith(".BasicSweeper")


@functools.cache
def _outlive_killed_jobs() -> None:
    """submitit's launcher asks each job for its results and raises where one was killed: make that job's failure its result."""
    if importlib.util.find_spec("submitit") is None:
        return
    from submitit.core.core import Job as Submitted

    theirs: Any = Submitted.results

    def results(job: Any) -> list[Any]:
        try:
            return theirs(job)
        except Exception as error:
            return [_killed(job, error)]

    Submitted.results = results  # type: ignore[method-assign, assignment]


def _killed(job: Any, error: Exception) -> Any:
    """What Hydra would have made of a job that ended without a result; where its log lies stands in submitit's words."""
    from hydra.core.utils import JobReturn, JobStatus

    submission = job.submission()
    overrides, config = submission.args[0], submission.function.config
    reason = f"ended without a result, killed perhaps; its log: {job.paths.stderr}"
    made = JobReturn(overrides=overrides, hydra_cfg=config, status=JobStatus.FAILED)
    made.return_value = Crash(reason)
    return made


def require_finished(jobs: Sequence[Job]) -> None:
    """Name the failed jobs, a line each, and raise: a `UserError` where all are the user's mistakes, else `JobsFailed`."""
    failed = {name(job, jobs): job.error for job in jobs if job.error is not None}
    if len(jobs) == 1:
        for error in failed.values():
            raise error
    for words, error in failed.items():
        print(f"failed: {words}: {error}", file=sys.stderr)
    kept = f"{len(failed)} of {len(jobs)} jobs failed; what the others made is kept, and the same command does the rest"
    if failed:
        raise (JobsFailed if any(isinstance(error, JobsFailed) for error in failed.values()) else UserError)(kept)


def name(job: Job, jobs: Sequence[Job]) -> str:
    """The words that tell a job from the others."""
    common = set.intersection(*(set(other.words) for other in jobs))
    return " ".join(word for word in job.words if word not in common) or " ".join(job.words)
