import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from reflow_lab import cli, paths
from reflow_lab.errors import bad_value, require
from reflow_lab.hydra_errors import explain, nearest

CONF = {
    "lab.yaml": """
        defaults: [hydra_lab, inf: baseline, _self_, experiment: null]
        seed: 0
        nfe: 9
        outputs: outputs
        training: {lr: 0.001, batch: 8}
        """,
    "train.yaml": "defaults: [lab, _self_]\nteacher: ???\nsource: ${teacher}\n",
    "evaluate.yaml": "defaults: [lab, _self_]\nhydra: {mode: MULTIRUN}\n",
    "inf/baseline.yaml": "defaults: [solver: heun]\n",
    "inf/solver/heun.yaml": "_target_: test_cli.Solver\nr: 0.5\n",
    "inf/solver/dpm.yaml": "_target_: test_cli.Solver\nr: 0.4\n",
    "experiment/quick.yaml": "# @package _global_\ndefaults: [{override /inf/solver: dpm}]\nnfe: 2\n",
    "experiment/wrong.yaml": "# @package _global_\ndefaults: [{override /inf/slover: dpm}]\n",
}


class Solver:
    def __init__(self, r: float) -> None:
        require(0 < r <= 1, "r", r, "a number in (0, 1]")
        self.r = r


def job(cfg):
    from hydra.utils import instantiate

    require(cfg.nfe >= 1, "nfe", cfg.nfe, "an integer of at least 1")
    print("ran", OmegaConf.select(cfg, "nfe"), instantiate(cfg.inf.solver).r)


def teach(cfg):
    return cfg.source


def bug(cfg):
    return cfg.a_key_that_is_nowhere


def value_error(cfg):
    raise ValueError("a bug of ours")


def interrupted(cfg):
    raise KeyboardInterrupt


def argv(cfg):
    print(sys.argv[1:])


def words(rest):
    print("words", rest)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A small configuration of its own, an empty working folder, and verbs that do next to nothing."""
    shipped = tmp_path / "shipped"
    for name, text in CONF.items():
        path = shipped / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    (shipped / "conf" / "hydra_lab.yaml").write_text((paths.conf_dir() / "hydra_lab.yaml").read_text())
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(paths, "_shipped", lambda name: shipped / name)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for verb in ("train", "evaluate"):
        monkeypatch.setitem(cli.VERBS, verb, cli.Verb("test_cli:job", ""))
    return tmp_path / "work"


@pytest.fixture
def run(lab, capfd):
    """Run a command line: (status, stdout, stderr)."""

    def run(*args):
        status = cli.main(list(args))
        return status, *capfd.readouterr()

    return run


def use(monkeypatch, function):
    monkeypatch.setitem(cli.VERBS, "train", cli.Verb(f"test_cli:{function.__name__}", ""))


def test_override_and_group(run):
    assert run("train", "nfe=3", "inf/solver=dpm") == (0, "ran 3 0.4\n", "")


def test_experiment(run):
    assert run("train", "experiment=quick") == (0, "ran 2 0.4\n", "")


def test_options_may_stand_anywhere(run):
    status, out, _ = run("train", "nfe=3", "--cfg", "job", "seed=5")
    assert status == 0 and "nfe: 3" in out and "seed: 5" in out


def test_sweep(run):
    status, out, _ = run("train", "-m", "nfe=1,2")
    assert status == 0 and out.splitlines() == ["ran 1 0.5", "ran 2 0.5"]


def test_a_verb_may_sweep_without_m(run):
    status, out, _ = run("evaluate", "nfe=1,2")
    assert status == 0 and out.splitlines() == ["ran 1 0.5", "ran 2 0.5"]


def test_hydra_leaves_no_folders(run, lab):
    run("train")
    assert list(lab.iterdir()) == []
    run("train", "-m", "nfe=1,2")
    assert [str(path.relative_to(lab)) for path in lab.rglob("*") if path.is_file()] == ["outputs/multirun/multirun.yaml"]


def test_plain_verb_gets_its_words(run, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "bench", cli.Verb("test_cli:words", "", is_hydra=False))
    assert run("bench", "train", "--json") == (0, "words ['train', '--json']\n", "")


def test_help_of_a_verb_lists_groups_and_keys(lab, capfd):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    out = capfd.readouterr().out
    assert not end.value.code
    assert "usage: reflow-lab train" in out and "inf/solver: dpm, heun" in out and "lr: 0.001" in out


def test_the_verb_is_in_argv_for_other_processes(run, monkeypatch):
    use(monkeypatch, argv)
    before = list(sys.argv)
    assert run("train", "nfe=3") == (0, "['train', 'nfe=3']\n", "")
    assert sys.argv == before


MISTAKES = {
    "key": (["train", "sed=1"], "sed=1: no such key; did you mean seed?"),
    "last part of a key": (["train", "lr=1"], "lr=1: no such key; did you mean training.lr?"),
    "nested key": (["train", "training.btch=1"], "training.btch=1: no such key; did you mean training.batch?"),
    "key like nothing": (["train", "training.xyz=1"], "training.xyz=1: no such key; there are training.batch, training.lr"),
    "argument": (
        ["train", "inf.solver.q=1"],
        "inf.solver.q=1: no such key; there are inf.solver._target_, inf.solver.r "
        "(+inf.solver.q=1 hands a new argument to its _target_)",
    ),
    "group": (["train", "inf/slover=dpm"], "inf/slover=dpm: no such key; did you mean inf/solver?"),
    "group in a file": (
        ["train", "experiment=wrong"],
        "inf/slover: no such key; did you mean inf/solver? (in conf/experiment/wrong.yaml)",
    ),
    "member": (["train", "inf/solver=dmp"], "inf/solver=dmp: no such member; did you mean dpm? available: dpm, heun"),
    "number for a member": (["train", "inf/solver=3"], "Config group override must be a string or a list. Got int"),
    "two mistakes": (["train", "sed=1", "nfee=2"], "sed=1: no such key; did you mean seed?"),
    "bare word": (["train", "foo"], "foo: not an override; write key=value or group=member (missing EQUAL at '<EOF>')"),
    "option": (["train", "--foo"], "unrecognized arguments: --foo (reflow-lab VERB --hydra-help lists the options)"),
    "sweep": (["train", "nfe=1,2"], "nfe=1,2: several values are a sweep: add -m, or write a list as key=[a,b]"),
    "range": (["train", "nfe=range(3)"], "nfe=range(3): several values are a sweep: add -m"),
    "value": (["train", "nfe=0"], "nfe=0: an integer of at least 1"),
    "value in evaluate": (["evaluate", "nfe=0"], "nfe=0: an integer of at least 1"),
    "value of an argument": (["train", "inf.solver.r=3"], "inf.solver.r=3: a number in (0, 1]"),
    "type of an argument": (["train", "inf.solver.r=a"], "inf.solver: test_cli.Solver does not accept its arguments: '<' not"),
    "new argument": (["train", "+inf.solver.q=1"], "inf.solver.q: test_cli.Solver has no such argument; it takes r"),
    "missing argument": (
        ["train", "~inf.solver.r"],
        "inf.solver: test_cli.Solver does not accept its arguments: Solver.__init__() missing",
    ),
    "target": (["train", "inf.solver._target_=test_cli.Nope"], "inf.solver._target_=test_cli.Nope: cannot be imported: "),
    "interpolation": (["train", "nfe=${nowhere}"], "nfe: Interpolation key 'nowhere' not found"),
    "folder": (["train", "--config-dir", "nowhere"], "Additional config directory"),
    "verb": (["trian"], "trian: no such verb; did you mean train?"),
    "no verb": (["nfe=3"], f"nfe=3: no such verb; the verbs are {', '.join(cli.VERBS)}"),
}


@pytest.mark.parametrize("args, line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, args, line):
    status, _, err = run(*args)
    messages = [message for message in err.splitlines() if message.startswith("reflow-lab: ")]
    assert status == 2
    assert err.count("Traceback") == 0 and len(messages) == 1
    assert messages[0].startswith(f"reflow-lab: {line}")
    assert err.startswith("reflow-lab: ") or args[0] == "evaluate"  # a sweep says first what it launches


def test_missing_value(run, monkeypatch):
    use(monkeypatch, teach)
    line = "source: MissingMandatoryValue while resolving interpolation: Missing mandatory value: teacher"
    assert run("train") == (2, "", f"reflow-lab: {line}\n")


def test_missing_group_choice(run, lab):
    (lab / "conf").mkdir()
    (lab / "conf" / "mine.yaml").write_text("defaults: [lab, {inf/solver@other: '???'}, _self_]\n")
    line = "inf/solver@other=???: choose one of dpm, heun"
    assert run("train", "--config-name", "mine") == (2, "", f"reflow-lab: {line}\n")


def test_broken_yaml_of_the_user(run, lab):
    (lab / "conf" / "experiment").mkdir(parents=True)
    (lab / "conf" / "experiment" / "mine.yaml").write_text("a: [1,\n")
    status, _, err = run("train", "experiment=mine")
    assert status == 2 and len(err.splitlines()) == 1 and "mine.yaml" in err


@pytest.mark.parametrize("function, error", [(bug, "ConfigAttributeError"), (value_error, "ValueError")])
def test_a_bug_keeps_its_traceback(run, monkeypatch, function, error):
    use(monkeypatch, function)
    with pytest.raises(Exception) as caught:
        run("train")
    assert type(caught.value).__name__ == error


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("REFLOW_LAB_DEBUG", "1")
    _, _, err = run("train", "nfe=0")
    assert "Traceback" in err and err.splitlines()[-1] == "reflow-lab: nfe=0: an integer of at least 1"


def test_interrupt(run, monkeypatch):
    use(monkeypatch, interrupted)
    assert run("train") == (130, "", "reflow-lab: interrupted\n")


def test_own_solver_from_the_working_folder(run, lab):
    (lab / "conf" / "inf" / "solver").mkdir(parents=True)
    (lab / "conf" / "inf" / "solver" / "mine.yaml").write_text("_target_: my_module.Mine\n")
    (lab / "my_module.py").write_text("class Mine:\n    r = 'mine'\n")
    assert run("train", "inf/solver=mine") == (0, "ran 9 mine\n", "")


def test_own_configuration_does_not_shadow_ours(run, lab):
    (lab / "conf").mkdir()
    (lab / "conf" / "train.yaml").write_text("something: else\n")
    assert run("train") == (0, "ran 9 0.5\n", "")


def test_another_applications_search_path_is_left_alone(lab):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    (lab / "conf").mkdir()
    with initialize_config_dir(str(lab), version_base="1.3"):
        providers = [entry.provider for entry in GlobalHydra.instance().config_loader().get_search_path().get_path()]
    assert "user" not in providers


def test_explain_passes_a_user_error_through():
    assert explain(bad_value("t_max", 2, "in (0, 1]")) == "t_max=2: in (0, 1]"


def test_nearest():
    names = {"inf", "inf.solver", "inf.solver.r", "inf/solver", "rr"}
    assert nearest("inf.solver.rr", names) == ["inf.solver.r"]
    assert nearest("inf.slover.r", names)[0] == "inf.solver.r"
    assert nearest("inf/slover", names) == ["inf/solver"]
    assert nearest("r", {"training.r", "dyn", "ra"}) == ["training.r"]
    assert nearest("nothing.alike", names) == []


# Start-up and completion, as the shell sees them


def shell(*args, **env):
    """The command in a fresh interpreter, as its console script starts it."""
    script = "import sys; sys.argv[0] = 'reflow-lab'; from reflow_lab.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help(capsys, args):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in cli.VERBS) and "examples:" in out


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert shell("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_light_start():
    script = "import sys, reflow_lab.cli as cli; cli.main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "lightning", "numpy"} & set(done.stdout.splitlines()[-1].split())


def test_version():
    done = shell("--version")
    assert done.returncode == 0 and done.stdout.split()[0] == "reflow-lab" and done.stdout.split()[1][0].isdigit()


def test_exit_status_of_the_process():
    done = shell("trian")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "reflow-lab: trian: no such verb; did you mean train?\n")


@pytest.mark.parametrize("name", ["bash", "fish"])
def test_completion_installs_for_the_command(name):
    done = shell("-sc", f"install={name}")
    assert done.returncode == 0 and "hydra_" in done.stdout and "reflow-lab" in done.stdout


COMPLETIONS = [
    ("reflow-lab ", "bench", "every verb"),
    ("reflow-lab tr", "train", "a verb"),
    ("reflow-lab train inf/sol", "inf/solver=", "a group"),
    ("/usr/bin/reflow-lab train inf/solver=d", "inf/solver=dpm", "a member"),
    ("reflow-lab train nfe=3 training.l", "training.lr=", "a key"),
]


@pytest.mark.parametrize("typed, offered", [case[:2] for case in COMPLETIONS], ids=[case[2] for case in COMPLETIONS])
def test_completion(run, monkeypatch, typed, offered):
    monkeypatch.setenv("COMP_LINE", typed)
    status, out, err = run("-sc", "query=bash")
    assert status == 0 and offered in out.split() and err == ""


SILENT = ["reflow-lab bench tr", "reflow-lab nonsense a", "reflow-lab train --c", "reflow-lab train experiment=x n"]


@pytest.mark.parametrize("typed", SILENT)
def test_completion_is_silent_where_it_knows_nothing(run, monkeypatch, typed):
    monkeypatch.setenv("COMP_LINE", typed)
    assert run("-sc", "query=bash")[2] == ""
