"""The command `reflow-lab VERB ...`. It starts light: a verb's module, and with it torch, is imported only when the verb runs."""

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reflow_lab import jobs
from reflow_lab.errors import UserError
from reflow_lab.paths import conf_dir


@dataclass(frozen=True)
class Verb:
    """A word of the command line, and the function `module:name` that does it."""

    target: str
    summary: str
    is_hydra: bool = True
    finish: str | None = None  #: what puts the results of a sweep together; such a verb sweeps over commas without -m

    def load(self) -> Callable[..., Any]:
        """The function: it takes the composed configuration, or, where the verb is no Hydra application, the remaining words."""
        return load(self.target)


def load(target: str) -> Callable[..., Any]:
    """The function that `module:name` names."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


VERBS = {
    "data": Verb(
        "reflow_lab.data.prepare:main", "make a data set's zip, in EDM's format, from the official files", is_hydra=False
    ),
    "train": Verb("reflow_lab.training.train:train", "train a base flow, a ReFlow or a flow map; the same command again resumes"),
    "pairs": Verb("reflow_lab.lrn.pairs:pairs", "draw pairs of noise and image from a velocity into a pair store"),
    "store": Verb("reflow_lab.lrn.inspection:main", "look into a pair store: info, verify, diagnose", is_hydra=False),
    "evaluate": Verb(
        "reflow_lab.evaluation.evaluate:evaluate",
        "measure a trained flow at few steps; commas sweep, with a table and a plot",
        finish="reflow_lab.evaluation.sweep:finish",
    ),
    "inspect": Verb(
        "reflow_lab.evaluation.inspection:inspect",
        "look closer: straightness along t, copies of training images, steps, classes, cost",
    ),
    "sample": Verb("reflow_lab.inf.sample:sample", "draw images from a trained flow"),
    "study": Verb("reflow_lab.studies.study:study", "run every row of a study and print its table"),
    "search": Verb("reflow_lab.search:search", "search settings of training with Optuna, each trial trained and measured"),
    "tables": Verb("reflow_lab.studies.page:main", "all results of studies on one page, experiments/README.md", is_hydra=False),
    "runs": Verb("reflow_lab.runs:main", "list and filter the runs of a folder of outputs, from its files alone", is_hydra=False),
    "import": Verb("reflow_lab.networks.import_pickle:main", "take over a published network of EDM or EDM2", is_hydra=False),
    "export": Verb(
        "reflow_lab.networks.export:main", "a run's weights, or its sampler, as one file, for another machine", is_hydra=False
    ),
    "ema": Verb("reflow_lab.training.posthoc:main", "make an average of another length from stored ones", is_hydra=False),
    "report": Verb("reflow_lab.report.page:main", "the results of studies as one HTML page, to read anywhere", is_hydra=False),
    "bench": Verb("reflow_lab.bench:main", "time training, sampling, pairs, data and metrics against others", is_hydra=False),
}

EXAMPLES = """\
  reflow-lab study study=quickstart                                       the ladder of improvements, as `make demo` runs it
  reflow-lab train experiment=quickstart dyn=improved dyn/time=uniform    any subset of the improvements
  reflow-lab train -m experiment=quickstart dyn=baseline,improved         a sweep
  reflow-lab evaluate run=FOLDER inf=baseline,improved nfe=1,2,4,9        one run at several step counts, as a table and a plot
  reflow-lab train --cfg job                                              the configuration, without running"""


def help_text() -> str:
    """What `reflow-lab --help` prints."""
    verbs = "\n".join(f"  {name:10}{verb.summary}" for name, verb in VERBS.items())
    return f"""\
usage: reflow-lab VERB [key=value ...] [group=member ...] [Hydra's options]

Fast flow models: ReFlow and its improvements, from one command.

verbs:
{verbs}

examples:
{EXAMPLES}

  reflow-lab VERB --help     what a verb can be told
  reflow-lab --version
  eval "$(reflow-lab -sc install=bash)"     tab completion (also install=zsh, install=fish)
  REFLOW_LAB_DEBUG=1 shows the traceback behind a one-line error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after a user's mistake (one line on stderr), 130 after ctrl-C.

    A sweep of which jobs failed returns 1, or 2 where all were the user's mistakes.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        _dispatch(args)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # `reflow-lab --help | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        line = _explain(error, args)
        if line is None:
            raise
        if os.environ.get("REFLOW_LAB_DEBUG") == "1":
            traceback.print_exc()
        return _complain(line, getattr(error, "status", 2))
    return 0


def _complain(line: str, status: int) -> int:
    print(f"reflow-lab: {line}", file=sys.stderr)
    return status


def _explain(error: Exception, args: Sequence[str]) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if "hydra" not in sys.modules:
        return None
    from reflow_lab.hydra_errors import explain

    return explain(error, *args[:1], overrides=args[1:])


def _dispatch(args: list[str]) -> None:
    word, rest = (args[0], args[1:]) if args else ("--help", [])
    if word in ("-h", "--help"):
        print(help_text())
    elif word == "--version":
        print(f"reflow-lab {importlib.metadata.version('reflow_lab')}")
    elif word in ("-sc", "--shell-completion"):
        _complete(rest)
    elif word not in VERBS:
        raise UserError(_unknown_verb(word))
    elif VERBS[word].is_hydra:
        run_hydra(word, rest)
    else:
        VERBS[word].load()(rest)


def _unknown_verb(word: str) -> str:
    near = difflib.get_close_matches(word, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
    return f"{word}: no such verb; {hint}"


def run_hydra(name: str, args: Sequence[str]) -> None:
    """Run the verb as the Hydra application whose primary configuration is conf/<name>.yaml."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them, so that `main` can word them
    before, finish = sys.argv, VERBS[name].finish
    command = [before[0], name, *args]
    sys.argv = [before[0], *(["--multirun"] if finish and _sweeps(args) else []), *_options_first(args)]
    try:
        with jobs.collected() as ran:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(_task(name, command))()
    finally:
        sys.argv = before
    done = [(job.words, job.result) for job in ran if job.error is None]
    if finish and len(done) > 1:
        load(finish)(done)
    jobs.require_finished(ran)


def _sweeps(args: Sequence[str]) -> bool:
    """Whether a word holds several values, e.g. nfe=1,2,4, and nothing asks for a sweep, or for something else than to run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if any(word.startswith("-") for word in args):
        return False
    with contextlib.suppress(HydraException):  # a word that cannot be read is refused later, in Hydra's own words
        return any(found.is_sweep_override() for found in OverridesParser.create().parse_overrides(list(args)))
    return False


def _task(name: str, command: list[str]) -> Callable[[Any], Any]:
    """The verb as Hydra calls it, perhaps in another process of some launcher."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    def task(cfg: Any) -> Any:
        sys.argv = command  # with its verb, as loggers note it
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # a user's `_target_: my_module.MySolver`; last, so that nothing installed is shadowed
        try:
            return VERBS[name].load()(cfg)
        except Exception as error:  # worded here: a launcher may carry it from another process, without its cause
            line = _explain(error, command[1:])
            if line is None and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise jobs.crashed(error) from error
            if line is None or isinstance(error, UserError):
                raise
            raise UserError(line) from error

    return task


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (reflow-lab VERB --hydra-help lists the options)")


def _options_first(args: Sequence[str]) -> list[str]:
    """Hydra's parser wants options and overrides apart, and answers a wrong option with its whole usage: mend both."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    overrides = parser.parse_intermixed_args(args).overrides
    return [word for word in args if word not in overrides] + overrides


def _complete(args: list[str]) -> None:
    """Tab completion. The shell calls the command without its verb and gives the line typed so far as COMP_LINE."""
    if not any(word.startswith("query=") for word in args):
        return run_hydra("train", ["-sc", *args])  # install, uninstall: the same for every verb
    typed = re.match(r"\s*\S+\s+(?P<verb>\S*)(?P<rest>\s.*)?$", os.environ.get("COMP_LINE", ""))
    if typed is None:
        return None
    if typed["rest"] is None:
        return print("\n".join(name for name in VERBS if name.startswith(typed["verb"])))
    if typed["verb"] in VERBS and VERBS[typed["verb"]].is_hydra:
        os.environ["COMP_LINE"] = f"reflow-lab{typed['rest']}"
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception, SystemExit):  # no word in the prompt
            run_hydra(typed["verb"], ["-sc", *args])
    return None


if __name__ == "__main__":
    sys.exit(main())
