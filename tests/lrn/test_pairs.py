"""Pairs of a teacher whose velocity is exact: Gaussian points, where the flow map is a multiplication."""

import numpy as np
import pytest
import torch

from reflow_lab import parts
from reflow_lab.data.toys import TwoMoons
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import EDM
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import HeunSigma
from reflow_lab.lrn import pairs
from reflow_lab.lrn.store import pair_labels, pair_noise
from reflow_lab.networks import files
from toy import config, teacher_file

INDICES = np.arange(64)


@pytest.fixture
def cfg(tmp_path):
    path = teacher_file(tmp_path / "teacher.safetensors")
    return lambda *overrides: config("pairs", tmp_path / "outputs", "teacher=run", f"teacher.path={path}", *overrides)


def exact(x, t, s):
    return Gaussian(0.0, 0.5).flow_map(x, torch.tensor(t), torch.tensor(s))


def test_backward_pairs_are_the_flow_map_of_their_noise(cfg):
    store = pairs.ensure(cfg("pairs.nfe=399"), "backward")
    x0, x1, label, _ = store.read(np.arange(96))
    torch.testing.assert_close(x0, exact(T_MAX * x1, T_MAX, 0.0), rtol=0, atol=1.5e-3)
    assert len(store) == 96 and label is None
    assert not torch.allclose(x0, exact(T_MAX * x1.flip(0), T_MAX, 0.0), atol=0.1)


def test_forward_pairs_are_the_inverse(cfg):
    settings = cfg("pairs.nfe=200")
    store = pairs.ensure(settings, "forward")
    x0, x1, _, _ = store.read(INDICES)
    assert torch.equal(x0, parts.data_source(settings).split("train").take(INDICES)[0])
    torch.testing.assert_close(exact(T_MAX * x1, T_MAX, 0.0), x0, rtol=0, atol=5e-3)
    back = sample(Gaussian(0.0, 0.5), x1, solver=HeunSigma(), grid=EDM(), nfe=199)
    torch.testing.assert_close(back, x0, rtol=0, atol=5e-3)


def test_forward_noise_is_standard_where_the_data_fits_the_teacher(cfg):
    _, x1, *_ = pairs.ensure(cfg("pairs.nfe=40", "pairs.num_forward=400", "pairs.shard_size=400"), "forward").read(np.arange(400))
    assert abs(x1.mean().item()) < 0.1 and x1.std().item() == pytest.approx(1, abs=0.07)


class Stops(Exception):
    pass


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("kind", ["backward", "forward"])
def test_a_killed_generation_resumes_to_the_same_bytes(cfg, monkeypatch, kind, tmp_path):
    undisturbed = files_of(pairs.ensure(cfg(f"outputs={tmp_path / 'other'}"), kind).folder)
    calls, velocity = [], parts.Teacher.velocity

    def failing(teacher, settings):
        inner = velocity(teacher, settings)

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == 40:  # in the second shard
                raise Stops
            return inner(*args, **kwargs)

        return call

    monkeypatch.setattr(parts.Teacher, "velocity", failing)
    with pytest.raises(Stops):
        pairs.ensure(cfg(), kind)
    made = pairs.plan(cfg(), kind)
    assert not made.is_done() and {n for n in files_of(made.folder) if n.endswith(".npy")} == {"shard-00000.npy"}
    before = (made.folder / "shard-00000.npy").stat().st_mtime_ns
    resumed = pairs.ensure(cfg(), kind).folder
    assert files_of(resumed) == undisturbed
    assert (resumed / "shard-00000.npy").stat().st_mtime_ns == before


def test_a_truncated_shard_of_an_unfinished_store_is_made_again(cfg):
    folder = pairs.ensure(cfg(), "backward").folder
    whole = files_of(folder)
    (folder / "done.json").unlink()
    (folder / "shard-00001.npy").write_bytes(whole["shard-00001.npy"][:100])
    pairs.ensure(cfg(), "backward")
    assert files_of(folder) == whole


def test_a_seed_that_changes_nothing_is_not_in_the_recipe(cfg):
    plain, noisy = ([pairs.plan(cfg(s, *more), "forward").key for s in ("pairs.seed=1", "pairs.seed=2")] for more in ((), NOISY))
    assert plain[0] == plain[1] and noisy[0] != noisy[1]


NOISY = ("pairs.start_noise=true",)


def test_a_whole_store_is_not_made_again(cfg, monkeypatch):
    first = pairs.ensure(cfg(), "backward").folder
    monkeypatch.setattr(pairs, "fill", None)
    assert pairs.ensure(cfg(), "backward").folder == first


def test_a_store_edited_by_hand_is_named(cfg):
    folder = pairs.ensure(cfg(), "backward").folder
    path = folder / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path}: is missing or was changed"):
        pairs.ensure(cfg(), "backward")


def test_the_recipe_holds_what_changes_the_pairs(cfg, tmp_path):
    same = {pairs.plan(cfg(*o), "backward").key for o in ((), ("seed=3",), ("trainer.devices=2",), ("pairs.num_forward=3",))}
    changes = [
        (),
        ("pairs.seed=3",),
        ("pairs.nfe=4",),
        ("pairs.num_backward=3",),
        ("inf/solver@pairs.solver=euler",),
        ("pairs.dtype=float16",),
    ]
    other = teacher_file(tmp_path / "other.safetensors", exact=False)
    keys = {pairs.plan(cfg(*o), "backward").key for o in [*changes, (f"teacher.path={other}",)]}
    assert len(same) == 1 and len(keys) == 7
    assert pairs.plan(cfg(), "forward").key not in keys


def test_num_pairs_and_seed_stand_in_for_the_configured_ones(cfg):
    store = pairs.ensure(cfg(), "backward", num_pairs=8, seed=77)
    assert len(store) == 8
    assert torch.equal(store.read(np.arange(8)).x1, pair_noise(77, np.arange(8), (2,)))


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (
            "backward",
            "inf/solver@pairs.solver=adaptive",
            r"pairs\.solver=reflow_lab\.inf\.solvers\.Adaptive: must be a fixed-step solver",
        ),
        ("backward", "inf/solver@pairs.solver=flow_map", "pairs/solver=flow_map: needs a flow map"),
        ("forward", "pairs.num_forward=401", r"pairs\.num_forward=401: only 400 differ .*pairs\.start_noise=true"),
        ("forward", "pairs.num_forward=0", r"pairs\.num_forward=0: must be a whole number"),
        ("backward", "pairs.num_backward=1.5", r"pairs\.num_backward=1\.5: must be a whole number"),
        ("backward", "pairs.shard_size=0", r"pairs\.shard_size=0: must be a whole number"),
        ("backward", "pairs.batch_size=none", r"pairs\.batch_size=none: must be a whole number"),
        ("backward", "pairs.seed=-1", r"pairs\.seed=-1: must be a whole number of at least 0"),
        ("backward", "pairs.nfe=0", r"pairs\.nfe=0: must be a whole number"),
        ("backward", "pairs.dtype=int4", r"pairs\.dtype=int4: allowed: uint8, float16, float32"),
        ("forward", "pairs.dtype=uint8", r"pairs\.dtype=uint8: holds images only"),
        ("backward", "pairs.dtype=uint8", r"pairs\.dtype=uint8: holds images only"),
        ("sideways", "pairs.seed=1", r"pairs\.kind=sideways: allowed: backward, forward"),
        ("backward", "precision=16", r"precision=16: allowed: 32-true, bf16-mixed"),
        ("forward", "pairs.flips=true", r"pairs\.flips=True: points have no left and right"),
        ("forward", "pairs.start_noise=3", r"pairs\.start_noise=3: must be true or false"),
        ("backward", "teacher.path=null", r"teacher\.path=None: needs a run folder or a weight file"),
        ("backward", "data.dim=3", r"makes samples of shape \(2,\), but the data has \(3,\)"),
    ],
)
def test_bad_settings_are_named(cfg, tmp_path, kind, override, message):
    with pytest.raises(UserError, match=message):
        pairs.ensure(cfg(override), kind)
    assert not (tmp_path / "outputs").exists()


def test_a_rule_that_only_samples_makes_no_forward_pairs(cfg):
    with pytest.raises(UserError, match="from noise to data only"):
        pairs.ensure(cfg("inf/solver@pairs.solver=rfpp"), "forward")


def test_nan_is_not_stored(cfg, tmp_path):
    path = teacher_file(tmp_path / "nan.safetensors")
    network = files.load(path)
    torch.nn.init.constant_(network.network.layers[-1].bias, float("nan"))
    files.save(network, path, files.describe(path))
    with pytest.raises(UserError, match="NaN or infinite values among pairs 0 to 15; no shard"):
        pairs.ensure(cfg(f"teacher.path={path}"), "backward")


CONDITIONAL = ("data=two_moons", "data.num_points=400", "net.network.num_classes=2")


def test_a_conditional_teacher_sees_the_labels(cfg, tmp_path):
    path = teacher_file(tmp_path / "moons.safetensors", *CONDITIONAL, exact=False)
    settings = cfg("data=two_moons", "data.num_points=400", f"teacher.path={path}")
    velocity = files.load(path)
    x0, x1, label, _ = pairs.ensure(settings, "backward").read(np.arange(96))
    assert torch.equal(label, pair_labels(settings.pairs.seed, np.arange(96), 2)) and label.unique().tolist() == [0, 1]
    rules = {"solver": HeunSigma(), "grid": EDM(), "nfe": 9}
    torch.testing.assert_close(sample(velocity, x1, label=label, **rules), x0, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sample(velocity, x1, label=1 - label, **rules), x0, atol=1e-2)
    forward = pairs.ensure(settings, "forward").read(np.arange(64))
    assert torch.equal(forward.label, TwoMoons(num_points=400).split("train").labels[:64])
