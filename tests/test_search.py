import json

import pytest

from reflow_lab import cli, search
from reflow_lab.errors import UserError
from reflow_lab.search import Parameter, Settings, Trial
from reflow_lab.training import train

SHORT = ["nfe=3", "training.total_kimg=2", "lrn=baseline", "evaluation.num_images=500"]
WORDS = ["hparams_search=toy", "hparams_search.num_trials=3", *SHORT]
PRESET = """
_target_: reflow_lab.search.Settings
_convert_: all
num_trials: 20
seed: 0
training_seed: 1000
noise_seed: 3000
space:
  lr: {key: training.lr, low: 1e-4, high: 1e-2, log: true}
  dropout: {key: lrn.dropout.fraction, low: 0, high: 1, step: 0.5}
samplers: [inf=baseline, inf/grid=uniform inf/solver=euler]
"""


@pytest.fixture
def run(toy, tmp_path, monkeypatch, capsys):
    """Search from the command line with a preset of the user's own: (status, stdout, the last lines of stderr)."""
    (tmp_path / "conf" / "hparams_search").mkdir(parents=True)
    (tmp_path / "conf" / "hparams_search" / "toy.yaml").write_text(PRESET)
    monkeypatch.chdir(tmp_path)

    def run(*more):
        status = cli.main(["search", *toy.words(*WORDS, "outputs=outputs", *more)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def fits(monkeypatch):
    """The learning rates and seeds that were trained; a function given to `before` is called before each."""
    done, real, before = [], train.fit, []

    def fit(cfg, made):
        for hook in before:
            hook(cfg)
        real(cfg, made)
        done.append((cfg.training.lr, cfg.lrn.dropout.fraction, cfg.seed))

    monkeypatch.setattr(train, "fit", fit)
    return done, before


def tables(folder):
    return [json.loads(path.read_text()) for path in folder.glob("outputs/search/*/table.json")]


def test_a_search_and_the_same_again(run, fits, tmp_path):
    status, out, _ = run()
    assert status == 0
    (found,) = tables(tmp_path)
    trials, done = found["trials"], list(fits[0])
    assert (tmp_path / found["after"]["run"]).is_dir()
    assert [(t["values"]["lr"], t["values"]["dropout"]) for t in trials[:1]] == [(1e-3, 1.0)]  # as configured
    assert {seed for *_, seed in done} == {0, 1000} and len(done) == len(set(done)) == 5  # the best and the start once more
    best = min(trials, key=lambda trial: trial["value"])
    assert trials[found["best"]] == best and best["overrides"][0] in found["overrides"]
    assert found["overrides"] in out and found["metric"] == "fd_points_teacher"
    assert found["difference"]["value"] == pytest.approx(found["after"]["value"] - found["before"]["value"])
    assert found["after"]["low"] < found["after"]["value"] < found["after"]["high"]
    assert all(trial["sampler"] in ([["inf=baseline"], ["inf/grid=uniform", "inf/solver=euler"]]) for trial in trials)
    again, text, _ = run()
    assert again == 0 and fits[0] == done and text.splitlines()[0] in out
    (after,) = tables(tmp_path)
    assert after == found


def test_a_killed_search_goes_on_where_it_was(run, fits, tmp_path):
    done, before = fits

    def kill(cfg):
        if len(done) == 2:
            raise KeyboardInterrupt

    before.append(kill)
    assert run()[0] == 130 and len(done) == 2 and tables(tmp_path) == []
    before.clear()
    assert run()[0] == 0
    assert len(done) == len(set(done)) == 5  # nothing twice


def test_a_trial_that_raises_is_marked_and_the_search_goes_on(run, fits, tmp_path):
    done, before = fits

    def fail(cfg):
        if cfg.seed == 1000 and len(done) == 1:
            before.clear()
            raise RuntimeError("out of\nmemory")

    before.append(fail)
    status, out, err = run()
    (found,) = tables(tmp_path)
    assert status == 0 and "Traceback" in err and "RuntimeError: out of memory" in out
    assert [trial["error"] for trial in found["trials"]] == [None, "RuntimeError: out of memory", None]
    assert found["trials"][1]["value"] is None and found["best"] != 1


MISTAKES = {
    "seed": (["seed=1000"], "hparams_search.training_seed=1000: must differ"),
    "noise": (["evaluation.seed=3000"], "hparams_search.noise_seed=3000: must differ"),
    "noise of pairs": (["pairs.seed=3000"], "evaluation.seed=3000: must differ from pairs.seed"),
    "key": (["hparams_search.space.lr.key=training.rl"], "training.rl: no such key; there are training.augment, "),
    "order": (["hparams_search.space.lr.low=1"], "training.lr: low, high, choices="),
    "trials": (["hparams_search.num_trials=0"], "hparams_search.num_trials=0: must be a whole number of at least 1"),
    "log": (["hparams_search.space.lr.low=0"], "training.lr: log=True: wants a positive low"),
    "word": (["+hparams_search.space.lr.hgih=0"], "hparams_search"),
}


@pytest.mark.parametrize("words, line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, fits, words, line):
    status, _, err = run(*words)
    messages = [message for message in err.splitlines() if message.startswith("reflow-lab: ")]
    assert status == 2 and len(messages) == 1 and messages[0].startswith(f"reflow-lab: {line}") and fits[0] == []


def test_no_preset(capsys):
    assert cli.main(["search"]) == 2
    assert "hparams_search=quickstart" in capsys.readouterr().err


# Without any training


def settings(num_trials=12, **space):
    return Settings(num_trials, 0, 1000, 3000, space or {"lr": {"key": "training.lr", "low": 1e-5, "high": 1e-1, "log": True}})


def found(monkeypatch, made, value, first=None):
    """The trials of a search whose trial of some values has this value, without training; None fails."""

    def tried(values, *_):
        result = value(**values)
        return Trial(values, [], [], result, None, None if result is not None else "failed")

    monkeypatch.setattr(search, "tried", tried)
    return search.run(made, None, [], first)


def test_the_same_values_give_the_same_trials(monkeypatch):
    def value(lr):
        return abs(lr - 1e-3)

    once, again = found(monkeypatch, settings(), value), found(monkeypatch, settings(), value)
    longer = found(monkeypatch, settings(num_trials=20), value)
    assert once == again == longer[:12]
    assert search.best(longer).value < 5e-4 and len({trial.values["lr"] for trial in longer}) > 15


def test_failed_trials_count_for_nothing(monkeypatch):
    trials = found(monkeypatch, settings(), lambda lr: None if lr > 2e-3 else lr)
    assert {trial.error for trial in trials} == {None, "failed"} and search.best(trials).values["lr"] <= 2e-3
    with pytest.raises(UserError, match="every trial failed; the first: failed"):
        search.best(found(monkeypatch, settings(), lambda lr: None))


def test_the_configured_values_come_first(monkeypatch):
    assert found(monkeypatch, settings(), lambda lr: lr, {"lr": 2e-3})[0].values == {"lr": 2e-3}


def test_parameter():
    forward = Parameter("lrn.coupling.forward", 0, 0.75, step=0.05, complement="lrn.coupling.backward")
    assert forward.overrides(0.15) == ["lrn.coupling.forward=0.15", "lrn.coupling.backward=0.85"]
    assert forward.has(0.7) and forward.has(0) and not forward.has(0.72) and not forward.has(0.8) and not forward.has(None)
    time = Parameter("dyn/time", choices=["uniform", "cosh"])
    assert time.overrides("cosh") == ["dyn/time=cosh"] and time.has("cosh") and not time.has("exponential")


def test_own_words():
    words = ["hparams_search=quickstart", "hparams_search.seed=3", "launcher=joblib", "seed=3", "dyn=improved", "+a.seed=1"]
    assert search.own_words(words) == ["dyn=improved", "+a.seed=1"]
