"""Projected stores: a teacher whose velocity is that of N(0, 1/4), and data that are something else."""

import json

import numpy as np
import pytest
import torch

from reflow_lab import cli
from reflow_lab.errors import UserError
from reflow_lab.lrn import pairs, projected
from reflow_lab.lrn.projection import w2_squared_exact
from reflow_lab.lrn.store import PairStore
from toy import SMALL, config, teacher_file

MEAN, STD = (0.4, -0.3), (0.8, 0.3)
DATA = [f"data.mean=[{MEAN[0]},{MEAN[1]}]", f"data.std=[{STD[0]},{STD[1]}]", "data.num_points=3000"]
PAIRS = ["pairs.num_backward=3000", "pairs.num_forward=3000", "pairs.nfe=19", "pairs.batch_size=500", "pairs.shard_size=1000"]
SINKHORN = ["projection=sinkhorn", "projection.batch_size=400"]


@pytest.fixture
def cfg(tmp_path):
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    words = ["teacher=run", f"teacher.path={teacher}", *DATA, *PAIRS, *SINKHORN, "pairs.kind=projected"]
    return lambda *more: config("pairs", tmp_path / "outputs", *words, *more)


def bound(half):
    """W2^2 between what the teacher's pairs have and what they should have, two normal laws, in closed form."""
    if half == "x0":  # N(0, 1/4) to the data
        return sum(m**2 + (s - 0.5) ** 2 for m, s in zip(MEAN, STD, strict=True))
    return sum((2 * m) ** 2 + (2 * s - 1) ** 2 for m, s in zip(MEAN, STD, strict=True))  # the data over 1/2, to N(0, 1)


@pytest.mark.parametrize(("kind", "half"), [("backward", "x0"), ("forward", "x1")])
def test_the_marginal_is_met_by_little_more_than_the_least_transport(cfg, kind, half):
    settings = cfg(f"pairs.projected_from={kind}")
    before, after = pairs.ensure(settings, kind), pairs.ensure(settings, "projected")
    judged = np.arange(2000)
    law = projected.marginal_of(settings, before, half).law("reference", judged)[0]
    distances = [w2_squared_exact(store.stored(judged), law) for store in (before, after)]
    moved = (after.stored(np.arange(3000)) - before.stored(np.arange(3000))).square().sum(1).mean().item()
    assert distances[0] > 0.8 * bound(half) and distances[1] < distances[0] / 4
    assert 0.5 * bound(half) < moved < 1.3 * bound(half)
    assert torch.equal(before.derived(judged), after.derived(judged))  # the half that was right already stays
    facts = after.manifest["made_by"]["projection"]
    ours, other = facts["marginals"][half], facts["marginals"]["x1" if half == "x0" else "x0"]
    assert ours["metric"] == "w2_squared" and ours["after"] < ours["before"] / 2 and ours["floor"] < ours["after"]
    assert other["before"] == other["after"] < 3 * other["floor"]
    assert facts["lam_proj"] == max(r["lam_proj"] for r in facts["rounds"] if r["kept"]) > 0
    assert after.manifest["source"] == pairs.plan(settings, kind).key


class Stops(Exception):
    pass


def test_a_killed_projection_goes_on_after_its_last_round(cfg, monkeypatch, tmp_path):
    whole = pairs.pairs(cfg(f"outputs={tmp_path / 'whole'}", "projection.lam_max=4", "projection.tolerance=0.1"))
    save, saved = projected.save, []

    def failing(made, path):
        if len(saved) == 2:
            raise Stops
        save(made, path)
        saved.append(len(made.rounds))

    monkeypatch.setattr(projected, "save", failing)
    with pytest.raises(Stops):
        pairs.pairs(cfg("projection.lam_max=4", "projection.tolerance=0.1"))
    saved.clear()
    monkeypatch.setattr(projected, "save", lambda made, path: (save(made, path), saved.append(len(made.rounds))))
    resumed = pairs.pairs(cfg("projection.lam_max=4", "projection.tolerance=0.1"))
    assert saved == [3] and whole.name == resumed.name
    for name in ["projection.safetensors", *(f"shard-0000{i}.npy" for i in range(3))]:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_a_projected_store_is_verified_against_its_source(cfg, capsys):
    folder = pairs.pairs(cfg("projection.lam_max=1"))
    assert cli.main(["store", "verify", str(folder), "--batches", "3"]) == 0
    assert "drawn again: 1500 of 1500 pairs to the last bit" in capsys.readouterr().out
    assert cli.main(["store", "info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "by Sinkhorn, lam_proj 1, displacement" in said and "x0        w2_squared" in said and "held out" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, text in [("projection", "may build only reflow_lab.lrn.projection"), ("source", "has the key")]:
        spoiled = manifest | {name: {"_target_": "os.system"} if name == "projection" else "0123"}
        (folder / "manifest.json").write_text(json.dumps(spoiled))
        assert cli.main(["store", "verify", str(folder)]) == 2
        assert text in capsys.readouterr().err


def test_a_conditional_coupling_keeps_its_classes(tmp_path):
    words = ["data=two_moons", "data.num_points=3000", "net.network.num_classes=2"]
    teacher = teacher_file(tmp_path / "moons.safetensors", *words)
    settings = config(
        "pairs", tmp_path, *words, *PAIRS, *SINKHORN, "teacher=run", f"teacher.path={teacher}", "pairs.kind=projected"
    )
    before, after = pairs.ensure(settings, "backward"), pairs.ensure(settings, "projected")
    x0, _, label, _ = after.read(np.arange(3000))
    data, classes = projected.marginal_of(settings, before, "x0").law("reference", np.arange(3000))
    assert torch.equal(label, before.labels(np.arange(3000)))
    for moon in (0, 1):
        ours, theirs = x0[label == moon][:1000], data[classes == moon][:1000]
        start = before.stored(np.arange(3000))[label == moon][:1000]
        assert w2_squared_exact(ours, theirs) < w2_squared_exact(start, theirs) / 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.projected_from=projected", "pairs.projected_from=projected: allowed: backward, forward"),
        ("projection.lam_max=0.5", "projection.lam_max=0.5: must be at least lam_start"),
        ("projection.blur=0", "projection.blur=0: must be above 0"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, override, message):
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    words = [*SMALL, "teacher=run", f"teacher.path={teacher}", *SINKHORN, "pairs.kind=projected", f"outputs={tmp_path}", override]
    assert cli.main(["pairs", *words]) == 2
    assert f"reflow-lab: {message}" in capsys.readouterr().err


def test_a_damaged_map_is_named(cfg):
    folder = pairs.pairs(cfg("projection.lam_max=1"))
    (folder / "done.json").unlink()
    (folder / projected.MAP).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=rf"{folder / projected.MAP}: not a whole projection"):
        pairs.pairs(cfg("projection.lam_max=1"))


def test_what_changes_the_pairs_is_in_the_recipe(cfg):
    keys = {pairs.plan(cfg(*o), "projected").key for o in ((), ("pairs.projected_from=forward",), ("projection.blur=0.2",))}
    assert len(keys) == 3
    assert pairs.plan(cfg("projection.blur=0.2"), "backward").key == pairs.plan(cfg(), "backward").key
    assert isinstance(pairs.ensure(cfg("projection.lam_max=1"), "projected"), PairStore)
