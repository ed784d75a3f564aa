"""The search for a sampler: on values that are known, on a Gaussian flow, and as the verbs use it."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate

from reflow_lab import cli, parts
from reflow_lab.artifacts import read_json
from reflow_lab.errors import UserError
from reflow_lab.evaluation import evaluate, targets
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf import auto
from reflow_lab.training import train
from tiny import composed

T_MAX = 80 / 81
SEARCH = ["inf=auto", "evaluation.search.num_images=400", "evaluation.search.num_trials=8"]


def value(nodes):
    """Least for DPM(r = 0.7) on EDM's grid with rho = 4."""
    grid, solver = nodes["grid"], nodes["solver"]
    rho, r = grid.get("rho", 20), solver.get("r", 2)
    return abs(rho - 4) / 4 + abs(r - 0.7)


def found(trials):
    return auto.best(trials)["value"]


def test_the_best_is_found_and_the_known_samplers_come_first():
    trials = auto.search(value, 80, 0, T_MAX)
    assert [trial["known"] for trial in trials] == [*auto.KNOWN, *[None] * 77]
    assert [trial["choice"] for trial in trials[:3]] == list(auto.KNOWN.values())
    assert found(trials) < 0.4 < min(trial["value"] for trial in trials[:3])
    kinds = {(trial["choice"]["grid"], trial["choice"]["solver"]) for trial in trials}
    assert {kind for kind, _ in kinds} == set(auto.GRIDS) and {kind for _, kind in kinds} == set(auto.SOLVERS)


def test_a_seed_fixes_the_trials():
    one, same, other = (auto.search(value, 20, seed, T_MAX) for seed in (1, 1, 2))
    assert one == same != other


def test_without_luck_it_is_the_best_of_the_known():
    """The best is never worse than they are: here nothing else is any good, and one has no value at all."""
    wanted = auto.nodes(auto.KNOWN["improved"])
    trials = auto.search(lambda nodes: 1.0 if nodes == wanted else float("inf"), 6, 0, T_MAX)
    assert auto.best(trials) == {"choice": auto.KNOWN["improved"], "value": 1.0, "known": "improved"}
    assert json.loads(json.dumps(trials, allow_nan=False))[0]["value"] is None
    with pytest.raises(UserError, match=r"^inf=auto: every sampler that was tried"):
        auto.best([{"value": None}])


def test_from_pure_noise_there_are_no_grids_in_sigma():
    trials = auto.search(value, 12, 0, 1.0)
    assert {trial["choice"]["grid"] for trial in trials} <= {"uniform", "sigmoid"}
    assert [trial["known"] for trial in trials[:3]] == ["baseline", "improved", None]


@pytest.mark.parametrize("preset", ["baseline", "improved"])
def test_the_known_samplers_are_the_presets(preset):
    given = composed("evaluate", f"inf={preset}").inf
    for group, node in auto.nodes(auto.KNOWN[preset]).items():
        assert instantiate(node) == instantiate(given[group])


def test_every_choice_is_a_sampler_that_words_of_the_command_line_make():
    for trial in auto.search(value, 30, 3, T_MAX):
        nodes = auto.nodes(trial["choice"])
        given = composed("evaluate", *auto.overrides(trial["choice"]).split()).inf
        assert all(instantiate(node) == instantiate(given[group]) for group, node in nodes.items())


def test_words():
    assert auto.words(auto.nodes(auto.KNOWN["native"])) == "HeunSigma on EDM(rho=7.0)"
    assert auto.words(composed("evaluate", "inf=improved").inf) == "DPM(r=0.4) on Sigmoid(kappa=10.0)"


def test_a_sampler_replaces_grid_and_solver_and_leaves_the_rest():
    cfg = composed("evaluate", "inf=auto", "+inf.other=3")
    changed = auto.with_sampler(cfg, auto.nodes(auto.KNOWN["baseline"]))
    assert auto.is_asked(cfg) and not auto.is_asked(changed) and changed.inf.other == 3
    assert auto.words(changed.inf) == "Heun on Uniform" and changed.evaluation == cfg.evaluation


# For a flow


class Exact(parts.Teacher):
    """The closed-form velocity of the Gaussian toy as a run, counting its calls."""

    def velocity(self, cfg):
        self.calls.append(0)

        def velocity(x_t, t, s=None, **_):
            self.calls[-1] += 1
            return Gaussian(0.0, 0.5)(x_t, t, s)

        return velocity


def exact():
    run = Exact(Path("exact"), "exact", {"num_classes": 0, "t_max": T_MAX})
    object.__setattr__(run, "calls", [])
    return run


def gaussian(outputs, *more):
    words = ["experiment=toy", "data=gaussian", "data.num_points=4000", "teacher=none", "trainer=cpu", f"t_max={T_MAX}"]
    return composed("evaluate", *words, "evaluation.num_images=1000", f"outputs={outputs}", *SEARCH, *more)


def test_of_a_flow_that_is_known(tmp_path, capsys):
    """What is found is better on the tuning noise than the known samplers, by measuring them again, and on fresh noise too."""
    cfg, run = gaussian(tmp_path, "nfe=4", "evaluation.search.num_trials=20"), exact()
    settled = evaluate.settled(cfg, run)
    (path,) = tmp_path.glob("sampler/*/search.json")
    trials = read_json(path)["trials"]
    tuning = gaussian(tmp_path, "nfe=4", f"evaluation.seed={cfg.evaluation.search.seed}", "evaluation.num_images=400")
    again = evaluate.tuning_distance(tuning, run)
    for trial in trials[:4]:
        assert again(auto.nodes(trial["choice"])) == pytest.approx(trial["value"])
    assert {key: parts.plain(settled.inf[key]) for key in ("grid", "solver")} == auto.nodes(auto.best(trials)["choice"])
    assert auto.is_asked(cfg)
    others = [auto.with_sampler(cfg, auto.nodes(choice)) for choice in auto.KNOWN.values()]
    ours, *theirs = (evaluate.measured(with_sampler, run)["fd_points"] for with_sampler in (settled, *others))
    assert found(trials) < min(trial["value"] for trial in trials[:3]) and ours < min(theirs)
    assert auto.overrides(auto.best(trials)["choice"]) in capsys.readouterr().out


def test_samplers_that_coincide_are_drawn_once_and_a_finished_search_is_read(tmp_path):
    """At 1 NFE all are one Euler step."""
    run, cfg = exact(), gaussian(tmp_path, "nfe=1")
    first = evaluate.settled(cfg, run)
    assert run.calls == [2]  # 400 points in batches of 250
    assert evaluate.settled(cfg, run).inf == first.inf and run.calls == [2]
    evaluate.settled(gaussian(tmp_path, "nfe=1", "evaluation.search.seed=2001"), run)
    assert run.calls == [2, 2]


def test_evaluate_reports_what_is_found_on_fresh_noise(toy, capsys, request):
    """The cell is that of the found sampler given by hand, the search's noise is not the evaluation's, and all is read back."""
    words = ["nfe=3", *SEARCH, "evaluation.search.num_trials=4", f"run={toy.teacher}"]
    metrics = evaluate.evaluate(toy.config("evaluate", *words))
    out = capsys.readouterr().out
    given = next(line for line in out.splitlines() if " tried): " in line).partition(" tried): ")[2].split()
    by_hand = evaluate.evaluate(toy.config("evaluate", "nfe=3", *given, f"run={toy.teacher}"))
    assert by_hand == metrics and metrics["protocol"]["evaluation"]["seed"] == 11
    stores = [read_json(path)["seed"] for path in toy.outputs.glob("pairs/*/recipe.json")]
    assert {11, 2000} <= set(stores)
    targets._SHARED.clear()
    request.getfixturevalue("no_network")
    assert evaluate.evaluate(toy.config("evaluate", *words)) == metrics


MISTAKES = {
    "evaluation.search.seed=11": "must differ from evaluation.seed and pairs.seed",
    "evaluation.search.seed=1000": "must differ from evaluation.seed and pairs.seed",
    "evaluation.search.seed=-1": "must be a whole number of at least 0",
    "evaluation.search.num_trials=2": "must be a whole number of at least 3",
    "evaluation.search.num_images=1": "must be a whole number of at least 50",
    "evaluation.search.num_images=5000": "the split reference has only 2000 samples",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_before_the_search(toy, no_network, mistake):
    with pytest.raises(UserError, match=f"^{mistake}: {MISTAKES[mistake]}"):
        evaluate.evaluate(toy.config("evaluate", *SEARCH, mistake, f"run={toy.teacher}"))


def test_training_does_not_search_and_sampling_says_where_to(toy, tmp_path, capsys):
    """The sampler is no part of what is trained; the few-step pictures are drawn with the improved one."""
    auto_, improved = (toy.config("train", f"inf={name}", "lrn=baseline") for name in ("auto", "improved"))
    assert train.plan(auto_).key == train.plan(improved).key
    assert auto.words(auto_.inf) == auto.words(improved.inf)
    status = cli.main(["sample", "inf=auto", f"run={toy.teacher}", f"out={tmp_path / 'x.npz'}", *toy.overrides])
    assert status == 2 and "inf=auto: is for evaluate and study" in capsys.readouterr().err
