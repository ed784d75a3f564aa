"""A folder of outputs with a tiny teacher in it, and the configurations that use it: shared by tests of the later verbs."""

from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from reflow_lab.paths import conf_dir
from reflow_lab.training.train import train

EVALUATION = ["evaluation.num_images=64", "evaluation.num_resamples=50", "evaluation.batch_size=24"]
STRAIGHTNESS = ["evaluation.straightness.num_images=8", "evaluation.straightness.nfe=5"]
COMMON = ["trainer=cpu", "debug=tiny", *EVALUATION, *STRAIGHTNESS]
POINTS = ["data.num_points=2000", "evaluation.num_images=1000", "pairs.batch_size=400", "net.network.width=32"]
IMAGES = ["precision=32-true", "net.network.channels=8", "evaluation.features.resolution=32"]
UNTRAINED = "training.total_kimg=0"


@dataclass(frozen=True)
class Lab:
    """Outputs, a teacher's run folder, and what every command there has in common."""

    outputs: Path
    overrides: tuple[str, ...]
    teacher: Path

    def words(self, *more: str) -> list[str]:
        """Overrides of a command with this teacher."""
        return [*self.overrides, "teacher=run", f"teacher.path={self.teacher}", f"outputs={self.outputs}", *more]

    def config(self, verb: str, *more: str) -> DictConfig:
        """The configuration of a verb with this teacher."""
        return composed(verb, *self.words(*more))


def composed(verb: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(verb, list(overrides))


def lab(outputs: Path, experiment: str, own: list[str], *training: str) -> Lab:
    """Train the experiment's base flow."""
    base = composed("train", f"experiment={experiment}_base", *COMMON, *own, *training, f"outputs={outputs}")
    return Lab(outputs, (f"experiment={experiment}", *COMMON, *own), train(base))
