"""Snapshots on the way, and averages of any width from them: a training on points, and EDM2's published layout."""

import json
import os
import shutil
import signal

import pytest
import torch

from reflow_lab.artifacts import Artifact
from reflow_lab.errors import UserError
from reflow_lab.networks import files
from reflow_lab.training import posthoc
from reflow_lab.training.module import FlowModule
from reflow_lab.training.posthoc import edm2_images, main
from reflow_lab.training.power_ema import sigma_rel_to_gamma
from reflow_lab.training.train import train
from toy import config

QUICK = [
    *["teacher=none", "training=base_flow", "lrn=base_flow", "net.network.dropout=0.1"],
    *[
        "dyn/weight=velocity",
        "dyn/time=uniform",
        "dyn/metric=squared_error",
        "training.total_kimg=5.12",
        "training.batch_size=32",
    ],
    *["training.num_heldout=16", "training.warmup_kimg=0.32", "training.lr=1e-2", "training.ema_halflives_mimg=[0.001]"],
    *["training.ema_sigma_rels=[0.05,0.1]", "training.snapshot_every_kimg=0.32"],
]
STEPS, STOP, STORED = 160, 93, 16


def run_config(outputs, *more):
    return config("train", outputs, *QUICK, *more)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run, and its weights after every step in float64."""
    torch.set_num_threads(1)
    history, step = [], FlowModule.training_step

    def training_step(self, batch, batch_idx):
        history.append([p.detach().double() for p in self.velocity.parameters()])
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowModule, "training_step", training_step)
        folder = train(run_config(tmp_path_factory.mktemp("watched")))
    history.append([p.double() for p in files.load(files.find(folder, "raw")).parameters()])
    return folder, history[1:]


def followed(history, gamma):
    """The average of that exponent over all steps, from the weights after each."""
    ends = (torch.arange(len(history) + 1, dtype=torch.float64) / len(history)) ** (gamma + 1)
    return [torch.einsum("s,s...->...", ends.diff(), torch.stack(steps)) for steps in zip(*history, strict=True)]


def distance(one, other):
    return sum((a.double() - b).square().sum() for a, b in zip(one, other, strict=True)).sqrt().item()


def loaded(folder, profile):
    return list(files.load(files.find(folder, profile)).parameters())


def bytes_of(folder, *where):
    return {p.name: p.read_bytes() for p in folder.joinpath(*where).iterdir()}


def test_a_run_stores_its_averages_on_the_way(watched):
    folder, _ = watched
    times = [f"{0.32 * (k + 1):011.3f}" for k in range(STORED)]
    names = {f"{time}kimg-{width}.safetensors" for time in times for width in ("0.050", "0.100")}
    assert set(bytes_of(folder, "snapshots")) == names
    about = files.describe(folder / "snapshots" / "0000002.560kimg-0.100.safetensors")
    assert about["ema"] == {"images": 2560, "sigma_rel": 0.1} and about["profile"] == "sigma0.1" and about["kimg"] == 2.56
    assert files.describe(files.find(folder))["profile"] == "ema0.001"
    last = files.load(folder / "snapshots" / "0000005.120kimg-0.050.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), loaded(folder, "sigma0.05"), strict=True))


@pytest.mark.parametrize("width, gamma", [("0.05", 16.972198602303447), ("0.1", 6.937203937601809)])
def test_what_training_follows_is_the_average_over_all_steps(watched, width, gamma):
    folder, history = watched
    expected = followed(history, gamma)
    assert distance(loaded(folder, f"sigma{width}"), expected) < 1e-5 * distance([0 * p for p in expected], expected)


class Accident(Exception):
    pass


def stop(how):
    def act(module):
        if module.global_step == STOP:
            how()

    return act


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise Accident


@pytest.mark.parametrize("how, every_s, error", [(interrupt, 60, KeyboardInterrupt), (fail, 0, Accident), (fail, 60, Accident)])
def test_stopped_and_gone_on_the_bytes_are_the_same(tmp_path, monkeypatch, watched, how, every_s, error):
    """After a signal, from the checkpoint of the step before, and from the start; half-written files are removed."""
    cfg, step = run_config(tmp_path, f"trainer.checkpoint_every_s={every_s}"), FlowModule.training_step

    def training_step(self, batch, batch_idx):
        stop(how)(self)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(FlowModule, "training_step", training_step)
        train(cfg)
    folder = tmp_path / "train" / watched[0].name
    assert len(bytes_of(folder, "snapshots")) == 18 and not (folder / "weights").exists()
    leftover = folder / "snapshots" / f".x.safetensors.{os.uname().nodename}.{2**22 + 1}.tmp"
    leftover.touch()
    assert train(cfg) == folder
    for where in ("snapshots", "weights"):
        assert bytes_of(folder, where) == bytes_of(watched[0], where)


def test_the_last_one_is_stored_though_no_interval_ends_there(tmp_path):
    folder = train(run_config(tmp_path, "training.total_kimg=0.96", "training.snapshot_every_kimg=0.5"))
    times = {name.split("kimg")[0] for name in bytes_of(folder, "snapshots")}
    assert times == {"0000000.512", "0000000.960"}


def test_nothing_is_stored_unless_asked(tmp_path):
    folder = train(run_config(tmp_path, "training.snapshot_every_kimg=null", "training.total_kimg=0.32"))
    assert not (folder / "snapshots").exists() and (folder / "weights" / "sigma0.1.safetensors").exists()


WIDTHS = {"0.04": "0.05", "0.075": "0.1", "0.15": "0.1"}  #: and the followed one next to it


@pytest.fixture(scope="module")
def made(watched):
    """The run, with averages that it did not follow."""
    main([str(watched[0]), "--sigma-rel", ",".join(WIDTHS)])
    return watched


@pytest.mark.parametrize("width, followed_width", WIDTHS.items())
def test_any_width_is_next_to_having_been_followed(made, width, followed_width):
    """A fiftieth of the distance to the average that was, with 16 snapshots of each."""
    folder, history = made
    expected = followed(history, sigma_rel_to_gamma(float(width)))
    found, stored = (distance(loaded(folder, f"sigma{name}"), expected) for name in (width, followed_width))
    assert found < 0.02 * stored


def test_the_run_stays_whole_and_its_default_the_same(made):
    folder, _ = made
    assert Artifact(folder, {}).is_done() and files.find(folder).stem == "ema0.001"
    about = files.describe(files.find(folder, "sigma0.15"))
    assert about["profile"] == "sigma0.15" and about["kimg"] == 5.12 and about["shape"] == [2] and "ema" not in about
    assert about["posthoc"]["sigma_rel"] == 0.15 and len(about["posthoc"]["snapshots"]) == 32


def test_again_it_returns_at_once_and_what_was_followed_is_left_alone(made, monkeypatch, capsys):
    monkeypatch.setattr(posthoc, "weighted", None)
    before = bytes_of(made[0], "weights")
    main([str(made[0]), "--sigma-rel", "0.1,0.15"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{made[0]}/weights/sigma0.1.safetensors: from 32 snapshots, its profile off by 0.00%"
    assert said[1].startswith(f"{made[0]}/weights/sigma0.15.safetensors: ") and bytes_of(made[0], "weights") == before


def test_the_average_at_an_earlier_time(made, tmp_path):
    """From the snapshots up to then, under a name of its own; one that was stored is itself."""
    folder, history = made
    main([str(folder), "--sigma-rel", "0.075,0.1", "--kimg", "3.84", "--out", str(tmp_path)])
    half, expected = files.load(tmp_path / "sigma0.075-3.84kimg.safetensors"), followed(history[:120], sigma_rel_to_gamma(0.075))
    assert distance(half.parameters(), expected) < 0.02 * distance(loaded(folder, "sigma0.1"), expected)
    itself = files.load(tmp_path / "sigma0.1-3.84kimg.safetensors").state_dict()
    stored = files.load(folder / "snapshots" / "0000003.840kimg-0.100.safetensors").state_dict()
    torch.testing.assert_close(itself, stored, rtol=1e-6, atol=1e-7)
    assert len(files.describe(tmp_path / "sigma0.075-3.84kimg.safetensors")["posthoc"]["snapshots"]) == 24


def test_files_and_a_folder_of_them_do_as_well(made, tmp_path):
    folder = made[0]
    paths = [str(path) for path in sorted((folder / "snapshots").iterdir())]
    for name, sources in (("a", paths), ("b", [str(folder / "snapshots")])):
        main([*sources, "--sigma-rel", "0.15", "--out", str(tmp_path / f"{name}.safetensors")])
        assert distance(loaded(tmp_path / f"{name}.safetensors", None), [p.double() for p in loaded(folder, "sigma0.15")]) == 0


def test_an_average_is_a_profile_to_the_other_verbs(made, tmp_path):
    words = [w for w in QUICK if not w.startswith(("teacher", "lrn", "training=", "training.total"))]
    chosen = ["teacher=run", f"teacher.path={made[0]}", "teacher.profile=sigma0.15", "training.total_kimg=0"]
    student = train(config("train", tmp_path, *words, *chosen))
    assert distance(loaded(student, "raw"), [p.double() for p in loaded(made[0], "sigma0.15")]) == 0


def copied(folder, tmp_path, *names):
    for name in names:
        shutil.copy(folder / "snapshots" / name, tmp_path)
    return tmp_path


FIRST, LAST = "0000000.320kimg-0.050.safetensors", "0000005.120kimg-0.050.safetensors"


@pytest.mark.parametrize(
    "names, words, reason",
    [
        ([FIRST], [], "at least two snapshots are wanted"),
        ([], [], "holds no snapshots: a run folder, or .safetensors or .pkl files are wanted"),
        ([FIRST, LAST], ["--sigma-rel", "0.2"], r"--sigma-rel=0.2: 2 snapshots of width 0.05 cannot carry it: .* off by \d+%"),
        ([FIRST, LAST], ["--sigma-rel", "0.3"], "--sigma-rel=0.3: must be numbers between 0 and 0.288"),
        ([FIRST, LAST], ["--sigma-rel", "wide"], "--sigma-rel=wide: must be numbers between 0 and 0.288"),
        ([FIRST, LAST], ["--kimg", "2.5"], r"--kimg=2.5: no snapshot ends there; allowed: 0.32, 5.12"),
        ([FIRST, LAST], ["--kimg", "0"], "--kimg=0: at least two snapshots up to there"),
        ([FIRST, LAST], ["--out", "no/where"], "--out=no/where: no such folder"),
        ([FIRST, LAST], ["--out", "no/where.safetensors"], "--out=no/where.safetensors: its folder does not exist"),
        (
            [FIRST, LAST],
            ["--sigma-rel", "0.04,0.05", "--out", "a.safetensors"],
            "--out=a.safetensors: several widths need a folder",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(made, tmp_path, monkeypatch, names, words, reason):
    monkeypatch.chdir(tmp_path)
    before = sorted(copied(made[0], tmp_path, *names).iterdir())
    with pytest.raises(UserError, match=reason) as error:
        main([str(tmp_path), *(["--sigma-rel", "0.05"] if "--sigma-rel" not in words else []), *words])
    assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before


def changed(path, **about):
    files.save_state(files.read_state(path), path, files.describe(path) | about)


def test_snapshots_that_do_not_belong_together_are_refused(made, tmp_path):
    folder = copied(made[0], tmp_path, FIRST, LAST)
    words = [str(folder), "--sigma-rel", "0.05", "--out", str(tmp_path / "a.safetensors")]
    net = files.describe(folder / LAST)["net"]
    for about, reason in (
        ({"net": net | {"sigma_data": 0.7}}, "belongs to another network than"),
        ({"run": "another"}, "is of another, but .* one training has to be behind all snapshots"),
        ({"ema": files.describe(folder / FIRST)["ema"]}, "is the same average as"),
        ({"ema": {"images": 5120, "sigma_rel": 0.4}}, "no average has width 0.4 after 5120 images"),
    ):
        before = files.describe(folder / LAST)
        changed(folder / LAST, **about)
        with pytest.raises(UserError, match=reason):
            main(words)
        changed(folder / LAST, **before)
    (folder / "a.safetensors").write_bytes(files.find(made[0], "raw").read_bytes())
    with pytest.raises(UserError, match=r"a\.safetensors: is no snapshot: it does not say of which average"):
        main(words)


def test_another_file_in_its_place_is_refused(made, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(files.find(made[0], "raw").read_bytes())
    with pytest.raises(UserError, match=f"--out={path}: is there already and holds something else"):
        main([str(made[0]), "--sigma-rel", "0.15", "--out", str(path)])


def test_an_unfinished_run_and_one_without_snapshots_are_refused(made, tmp_path):
    other = tmp_path / made[0].name
    shutil.copytree(made[0], other)
    (other / "done.json").unlink()
    with pytest.raises(UserError, match=f"source={other}: is not finished; repeat its train command"):
        main([str(other), "--sigma-rel", "0.05"])
    shutil.rmtree(other / "snapshots")
    Artifact(other, json.loads((other / "recipe.json").read_text())).finish()
    with pytest.raises(UserError, match=f"source={other}: has no snapshots; training.snapshot_every_kimg makes"):
        main([str(other), "--sigma-rel", "0.05"])


def test_the_images_behind_a_name_of_edm2():
    """2^28, 2^31 and 2^24 are what their names round down; a number of thousands that no multiple gives stays."""
    assert [edm2_images(kimg) for kimg in (268435, 2147483, 16777)] == [2**28, 2**31, 2**24]
    assert edm2_images(1) == 1024 and edm2_images(42) == 42 * 1000
