"""Hands the rows of a study to Hydra's launchers (Hydra discovers plug-ins in the namespace hydra_plugins only)."""

import time
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class StudySweeperConf:
    """hydra/sweeper=study, which conf/study.yaml chooses."""

    _target_: str = "hydra_plugins.reflow_lab_study_sweeper.StudySweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="study", node=StudySweeperConf, provider="reflow_lab")


class StudySweeper(Sweeper):
    """A job for every row and training seed; then the table of what was found."""

    launcher: Launcher
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Check all rows, launch them together, write the table. Raises `JobsFailed` at the end if some could not be done."""
        from reflow_lab.studies.request import asked  # here: Hydra loads every plug-in, whatever the verb

        asked(self.config, arguments)
        from reflow_lab.studies import study  # after that, since torch and all else take seconds

        jobs = study.jobs(self.config, arguments)
        begun = time.time()
        words = [[*arguments, f"job=[{number},{seed},{begun:.3f}]"] for number, _, seed in jobs]
        returns = self.launcher.launch(words, initial_job_idx=0)
        ended = [outcome(name, seed, found) for (_, name, seed), found in zip(jobs, returns, strict=True)]
        return study.finish(self.config, arguments, ended)


def outcome(row: str, seed: int, found: JobReturn) -> Any:
    """How a job ended, for the table."""
    from reflow_lab.studies.study import Outcome

    if found.status == JobStatus.COMPLETED:
        return Outcome(row, seed, found.return_value, None)
    return Outcome(row, seed, [], one_line(found._return_value))


def one_line(error: BaseException) -> str:
    """What went wrong, with its kind where it is no user's mistake."""
    from reflow_lab.errors import UserError

    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
