"""Adversarial fine-tuning as a stage of training: what it moves, that it resumes and divides exactly, what it refuses."""

import json

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from test_ddp import assert_same, folder_of, lines, two
from test_train_networks import SMALL, WIDE

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.flow import flow_map, interpolate
from reflow_lab.flow_maps import derivatives
from reflow_lab.flow_maps.adversarial import FineTuning, last_weight
from reflow_lab.flow_maps.distillation import Distillation
from reflow_lab.networks import files
from reflow_lab.networks.embedding import Aim
from reflow_lab.training import train as training
from reflow_lab.training.module import FlowModule
from reflow_lab.training.train import train
from tiny import composed
from toy import config, teacher_file

STEPS = 20
FLOW_MAP = [
    *[
        "flow_map=ayf",
        "lrn=flow_map",
        "training=flow_map",
        "inf=flow_map",
        "teacher=run",
        "nfe=1",
        "budget.flow_map.warmup_steps=0",
    ],
    *["training.batch_size=32", "training.num_heldout=16", "training.total_kimg=0.32", "training.warmup_kimg=0"],
    *["trainer.log_every_kimg=0.032", "trainer.diagnostics_every_kimg=0.32", "training.ema_halflives_mimg=[0.0005]"],
]
TUNED = [
    *FLOW_MAP,
    "training=adversarial",
    "flow_map/adversarial=stylegan2",
    "flow_map.adversarial.channels=8",
    "training.lr=1e-3",
]
TINY = {"mlp": {}, "unet_small": SMALL, **dict.fromkeys(("ddpmpp", "ncsnpp"), SMALL), **dict.fromkeys(("adm", "edm2_xs"), WIDE)}
LONG = ["training.total_kimg=0.64"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What starts a fine-tuning: the teacher, and a flow map distilled from it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    taught = [f"teacher.path={teacher_file(folder / 'teacher.safetensors', exact=False)}"]
    return [*TUNED, *LONG, *taught, f"training.start={train(config('train', folder, *FLOW_MAP, *taught))}"]


@pytest.fixture(scope="module")
def tuned(words, tmp_path_factory):
    """An undisturbed run."""
    torch.set_num_threads(1)
    return train(config("train", tmp_path_factory.mktemp("tuned"), *words))


def weights(folder):
    return {path.name: load_file(path) for path in (folder / "weights").iterdir()}


def start_of(words):
    return next(word.partition("=")[2] for word in words if word.startswith("training.start="))


def test_it_moves_the_flow_map_and_logs_both_sides(words, tuned):
    logged = [line for line in lines(tuned) if "adversarial/margin" in line]
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    names = {f"adversarial/{n}" for n in ("critic_loss", "student_loss", "margin", "r1", "r2", "adaptive_weight")}
    assert set(logged[0]) == {"step", *names}
    assert all(line["adversarial/adaptive_weight"] > 0 and line["adversarial/r1"] > 0 for line in logged)
    before, after = load_file(files.find(start_of(words), "raw")), load_file(tuned / "weights" / "raw.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert not (tuned / "align.json").exists()
    recipe = json.loads((tuned / "recipe.json").read_text())
    assert recipe["config"]["flow_map"]["adversarial"]["r1"] == 0.1


@pytest.mark.slow
def test_compiled_it_is_the_same_training(words, tmp_path):
    """By inductor, whose graphs keep what the gradient at the last layer asks for before the step's own backward pass."""
    torch._dynamo.reset()
    derivatives.compiled_product.cache_clear()
    short = ["training.total_kimg=0.128"]
    plain, compiled = (
        train(config("train", tmp_path / str(wanted), *words, *short, f"training.compile={str(wanted).lower()}"))
        for wanted in (False, True)
    )
    ours, theirs = (load_file(files.find(folder, "raw")) for folder in (compiled, plain))
    start = load_file(files.find(start_of(words), "raw"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=1e-3)
    assert any((value - start[key]).abs().max() > 1e-3 for key, value in theirs.items())


def test_without_a_weight_it_is_distillation(words, tmp_path):
    """The discriminator, which draws from a generator of its own, changes nothing else."""
    alone = [word for word in words if not word.startswith("flow_map")]
    one = train(config("train", tmp_path, "flow_map=ayf", *alone))
    other = train(config("train", tmp_path, *words, "flow_map.adversarial.weight=0"))
    assert one.name != other.name
    for name, state in weights(one).items():
        torch.testing.assert_close(state, weights(other)[name], rtol=1e-5, atol=1e-6)
    assert "adversarial" not in json.loads((one / "recipe.json").read_text())["config"]["flow_map"]


class Killed(Exception):
    pass


def test_stopped_anywhere_it_ends_with_the_same_bits(words, tuned, tmp_path, monkeypatch):
    step = FlowModule.training_step

    def killed_at(number):
        def training_step(module, batch, index):
            if module.global_step == number:
                raise Killed
            return step(module, batch, index)

        return training_step

    cfg = config("train", tmp_path, *words, "trainer.checkpoint_every_s=0")
    for number in (3, 11):
        monkeypatch.setattr(FlowModule, "training_step", killed_at(number))
        with pytest.raises(Killed):
            train(cfg)
        assert torch.load(folder_of(tmp_path) / "last.ckpt", weights_only=True)["global_step"] == number
    monkeypatch.setattr(FlowModule, "training_step", step)
    again = train(cfg)
    assert again.name == tuned.name
    for name, state in weights(tuned).items():
        assert all(torch.equal(value, weights(again)[name][key]) for key, value in state.items())
    for ours, theirs in zip(lines(tuned), lines(again), strict=True):
        assert {**ours, "images_per_s": 0} == {**theirs, "images_per_s": 0} if "images_per_s" in ours else ours == theirs


def test_two_processes_train_what_one_does(words, tuned, tmp_path):
    """Groups of the minibatch statistics are consecutive rows, and gradients of the discriminator are averaged."""
    assert two(config("train", tmp_path, *words, "trainer.devices=2")) == [0, 0]
    assert_same(tuned, folder_of(tmp_path), tolerance=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.start=teacher", r"^training\.start=teacher: must be the run of a flow map"),
        ("training.start=scratch", r"^training\.start=scratch: must be the run of a flow map"),
        ("flow_map.warmup_steps=10", r"^flow_map\.warmup_steps=10: must be 0 with flow_map/adversarial"),
    ],
)
def test_nonsense_is_refused_before_any_work(words, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(config("train", tmp_path, *words, override))
    assert not any(tmp_path.iterdir())


def test_a_velocity_is_not_fine_tuned(words, tmp_path):
    velocity = teacher_file(tmp_path / "velocity.safetensors", exact=False)
    with pytest.raises(UserError, match=r"^training\.start=.*velocity\.safetensors: must be the run of a flow map"):
        train(config("train", tmp_path / "outputs", *words, f"training.start={velocity}"))


def opened(words, outputs, *more):
    """The network at its start and its objective."""
    cfg = config("train", outputs, *words, *more)
    training.plan(cfg)
    network = training.start(cfg)
    objective = training.objective_of(cfg, network)
    assert isinstance(objective, FineTuning)
    return network, objective


def batch():
    g = torch.Generator().manual_seed(3)
    return torch.randn(16, 2, generator=g), torch.randn(16, 2, generator=g), torch.rand(16, 4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.7, None])
def test_the_judged_jump_starts_where_it_is_told(words, tmp_path, t):
    """At t or at the times that the distillation draws; it ends at 0, and what is judged is where it ends."""
    network, objective = opened(words, tmp_path, f"flow_map.adversarial.t={'null' if t is None else t}")
    asked, shown = [], []
    objective.adversary.train = lambda real, fake, label: shown.append((real, fake))

    def velocity(x_t, t, s, **more):
        asked.append((x_t, t, s))
        return network(x_t, t, s, **more)

    x0, x1, u = batch()
    losses = objective(velocity, x0, x1, u, None, 0)
    x_t, start, end = asked[-1]
    assert torch.equal(start, losses.t if t is None else torch.full((16,), t)) and not end.any()
    torch.testing.assert_close(x_t, (1 - start[:, None]) * x0 + start[:, None] * x1)
    ((real, fake),) = shown
    assert real is x0
    torch.testing.assert_close(fake, x_t - start[:, None] * network(x_t, start, end))


def test_each_side_trains_its_own_weights(words, tmp_path):
    network, objective = opened(words, tmp_path)
    judge, kept = objective.adversary.discriminator, training.loss(config("train", tmp_path, *words))
    before = [p.detach().clone() for p in judge.parameters()]
    losses = objective(network, *batch(), None, 0)
    moved = [p.detach().clone() for p in judge.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    assert all(p.grad is None for p in network.parameters())  # the discriminator's step stops at the samples
    gradients = [p.grad.clone() for p in judge.parameters()]
    losses.total.mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(judge.parameters(), gradients, strict=True))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    torch.testing.assert_close(losses.raw, kept(network, *batch(), None, 0).raw)  # the regulariser's error is what is reported


def test_the_students_share_of_both_losses(words, tmp_path):
    """At the last layer the adversarial gradient is `weight` times as long as the regulariser's."""
    network, objective = opened(words, tmp_path, "flow_map.adversarial.weight=0.25")
    (last,) = (objective.adversary.last,)
    assert last is last_weight(network)
    total = objective(network, *batch(), None, 0).total.mean()
    kept = Distillation.forward(objective, network, *batch(), None, 0).total.mean()
    whole, regulariser = (torch.autograd.grad(loss, last)[0] for loss in (total, kept))
    assert ((whole - regulariser).norm() / regulariser.norm()).item() == pytest.approx(0.25, rel=1e-4)


def test_samples_that_pass_for_data_are_what_it_wants(words, tmp_path):
    """The step of the student raises D(fake): by its gradient, against a discriminator that stays."""
    network, objective = opened(words, tmp_path)
    x0, x1, _ = batch()
    t, s = torch.full((16,), 0.9), torch.zeros(16)
    x_t = interpolate(x0, x1, t)

    def value():
        return objective.adversary.losses(x0, flow_map(network(x_t, t, s), x_t, t, s), None).mean()

    first = value()
    torch.optim.SGD(network.parameters(), 1e-3).zero_grad()
    first.backward()
    with torch.no_grad():
        for p in network.parameters():
            p -= 1e-2 * (p.grad if p.grad is not None else 0)
    assert value() < first


@pytest.mark.parametrize("net", TINY)
def test_the_last_layer_of_every_network(net):
    """Without its weight the output knows nothing of the input."""
    sizes = [f"net.network.{key}={value}" for key, value in TINY[net].items()]
    data = "two_moons" if net == "mlp" else "cifar10"
    cfg = composed("train", "~experiment", f"data={data}", f"net={net}", *sizes, "flow_map=ayf", "teacher=none")
    parts.settle_net(cfg)
    network = instantiate(cfg.net)
    last = last_weight(network)
    with torch.no_grad():
        torch.nn.init.normal_(last)
        if hasattr(network.network, "out_gain"):
            network.network.out_gain.fill_(1)
        shape = (2, 2) if net == "mlp" else (2, 3, 32, 32)
        x, t, aim = torch.randn(shape), torch.tensor([0.9, 0.4]), Aim(torch.zeros(2), torch.ones(2))
        spread = [network.network(x, t, None, aim=aim).diff(dim=0).abs().max().item()]
        last.zero_()
        spread.append(network.network(x, t, None, aim=aim).diff(dim=0).abs().max().item())
    assert spread[0] > 1e-3 and spread[1] == 0


def test_a_network_of_another_make_is_named():
    with pytest.raises(UserError, match=r"^flow_map/adversarial=Identity: needs a network whose last layer is called one of"):
        last_weight(torch.nn.Identity())
