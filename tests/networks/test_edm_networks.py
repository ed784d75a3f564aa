"""What holds for every network of EDM and EDM2; that they are those networks, tests/networks/test_import_pickle.py shows."""

import copy
from functools import partial

import filled
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.lrn.dropout import scale_dropout
from reflow_lab.networks.adm import ADM
from reflow_lab.networks.attention import in_forward_ad
from reflow_lab.networks.ddpmpp import DDPMpp
from reflow_lab.networks.edm2 import EDM2
from reflow_lab.networks.ncsnpp import NCSNpp
from reflow_lab.networks.precision import InPrecision
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.paths import conf_dir

SONG = {"channels": 16, "multipliers": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}
WIDE = {"channels": 64, "multipliers": (1, 1), "num_blocks": 1, "attention_resolutions": (4,)}  # a head has 64 channels
TINY = {
    "ddpmpp": partial(DDPMpp, **SONG),
    "ncsnpp": partial(NCSNpp, **SONG),
    "adm": partial(ADM, **WIDE),
    "edm2": partial(EDM2, **WIDE),
}
EDM_ONLY = ("ddpmpp", "ncsnpp", "adm")


def made(name, **changed):
    """A tiny network with every path alive, which its initialisation is not."""
    network = TINY[name](3, 8, **changed)
    state = network.state_dict()
    network.load_state_dict({key: filled.weight(key, value.shape) for key, value in state.items()})
    return network


def batch(num=4, dtype=torch.float32):
    t = torch.tensor([0.01, 0.3, 0.8, 0.98], dtype=dtype)[:num]
    return filled.drawn("x", (num, 3, 8, 8)).to(dtype), t, torch.tensor([0, 2, 1, 2])[:num]


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def test_every_parameter_is_used(name):
    more = {"augment_dim": 9} if name in EDM_ONLY else {}
    network, (x, t, label) = made(name, num_classes=3, **more), batch()
    asked = {"augment": filled.drawn("augment", (4, 9))} if more else {}
    y = network(x, t, label, **asked)
    assert y.shape == x.shape and y.isfinite().all() and y.std() > 0.1
    y.square().sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_see_each_other(name):
    network, (x, t, label) = made(name, num_classes=3).eval(), batch()
    torch.testing.assert_close(network(x, t, label)[1:2], network(x[1:2], t[1:2], label[1:2]), rtol=1e-4, atol=1e-5)


def test_time_label_and_augmentation_condition_it(name):
    network, (x, t, label) = made(name, num_classes=3).eval(), batch(1)
    answers = [network(x, t, label), network(x, t + 0.3, label), network(x, t, label + 1), network(x, t)]
    if name in EDM_ONLY:
        network = made(name, num_classes=3, augment_dim=2).eval()
        with_zeros = network(x, t, label, torch.zeros(1, 2))
        torch.testing.assert_close(with_zeros, network(x, t, label))
        answers += [network(x, t, label, torch.ones(1, 2))]
        torch.testing.assert_close(
            Preconditioned(network)(x, t, label=label, augment=torch.zeros(1, 2)), Preconditioned(network)(x, t, label=label)
        )
    assert all((a - b).norm() > 1e-2 * a.norm() for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_finite_at_both_ends_and_what_it_is_next_to_them(name, t):
    """EDM's ln(sigma) / 4 is infinite there."""
    model, x = Preconditioned(made(name)).eval(), batch(2)[0]
    end, near = torch.tensor(t, requires_grad=True), torch.tensor(abs(t - 1e-6))
    found = model(x, end)
    assert found.isfinite().all()
    torch.testing.assert_close(found, model(x, near), rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert end.grad.isfinite()


def test_forward_mode_derivative(name):
    """Along a direction in x and t, against a central difference in float64; no backend is chosen by the caller."""
    model = Preconditioned(made(name, num_classes=3)).double().eval()
    x, t, label = batch(3, torch.float64)
    v, one, step = filled.drawn("v", x.shape).double(), torch.ones(3, dtype=torch.float64), 1e-7
    value, slope = torch.func.jvp(lambda x, t: model(x, t, label=label), (x, t), (v, one))
    assert not in_forward_ad()
    torch.testing.assert_close(value, model(x, t, label=label), rtol=1e-9, atol=1e-9)
    ahead, behind = (model(x + h * v, t + h, label=label) for h in (step, -step))
    expected = (ahead - behind) / (2 * step)
    assert slope.norm() > 1 and (slope - expected).norm() < 1e-5 * expected.norm()


def test_backward_derivative_is_the_forward_one(name):
    """The transposed derivative in w . (dF v), in float64."""
    model = Preconditioned(made(name)).double().eval()
    x, t, _ = batch(2, torch.float64)
    v, w = (filled.drawn(key, x.shape).double() for key in "vw")
    _, forward = torch.func.jvp(lambda x: model(x, t), (x,), (v,))
    (backward,) = torch.autograd.grad(model(x.requires_grad_(), t), x, w)
    torch.testing.assert_close((forward * w).sum(), (backward * v).sum(), rtol=1e-9, atol=1e-9)


LEVELS = {"eager": (1,), "aot_eager": (1, 1), "inductor": (1,)}
SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in list(LEVELS)[1:]]


@pytest.mark.parametrize("backend", ["eager", *SLOW])  # the first shows that torch can trace it, the others run it
def test_it_compiles(name, backend):
    """Training, with its backward pass, and a Jacobian-vector product: the same numbers, and one graph each.

    But for EDM2's training: its weights are written between two graphs.
    """
    torch._dynamo.reset()
    model = Preconditioned(made(name, num_classes=3, dropout=0.0, multipliers=LEVELS[backend]))
    x, t, label = batch()
    twin = copy.deepcopy(model)
    expected = model(x, t, label=label)
    found = torch.compile(twin, backend=backend, fullgraph=name != "edm2")(x, t, label=label)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward(), found.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(a.grad.norm()))
        torch.testing.assert_close(a, b)  # EDM2's pass writes weights

    def product(x, t):
        return torch.func.jvp(lambda x, t: model(x, t), (x, t), (x, t))[1]

    model.eval()
    with torch.no_grad():
        found = torch.compile(product, backend=backend, fullgraph=True)(x, t)
        torch.testing.assert_close(found, product(x, t), rtol=1e-3, atol=1e-3)


def test_bfloat16_rounds_the_network_little(name):
    model, (x, t, label) = Preconditioned(made(name, num_classes=3)).eval(), batch()
    exact, rounded = (InPrecision(model, kind)(x, t, label=label) for kind in ("32-true", "bf16-mixed"))
    assert rounded.dtype == torch.float32
    assert 1e-4 * exact.norm() < (exact - rounded).norm() < 2e-2 * exact.norm()


def test_noise_levels_stay_apart_in_bfloat16(name):
    """The embedding is exempt from it: at 8 bits, levels 1 % apart would be one."""
    network, (x, _, _) = made(name).eval(), batch(1)
    seen = []
    layer = network.enc["8x8_block0"]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    for t in (0.5, 0.501):
        InPrecision(Preconditioned(network), "bf16-mixed")(x, torch.tensor([t]))
    assert seen[0].dtype == torch.float32 and (seen[0] - seen[1]).norm() > 0


def test_dropout_is_changed_without_rebuilding(name):
    model, (x, t, _) = Preconditioned(made(name, dropout=0.4)), batch()
    assert not torch.equal(model(x, t), model(x, t))
    scale_dropout(model, 0.5)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    scale_dropout(model, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), model.eval()(x, t), rtol=1e-4, atol=1e-5)


def test_the_state_goes_to_a_network_of_other_initial_weights(name):
    """Everything that counts is in it, random frequencies included."""
    network, other, (x, t, label) = made(name, num_classes=3).eval(), TINY[name](3, 8, num_classes=3).eval(), batch()
    assert not torch.allclose(network(x, t, label), other(x, t, label))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x, t, label), other(x, t, label))


def test_a_fresh_network_answers_next_to_nothing(name):
    """Its head and what ends its residual branches start at, or near, zero, so that training starts from the preconditioning."""
    y = TINY[name](3, 8, num_classes=3)(*batch())
    assert y.abs().max() < 1e-3


def test_channels_last_and_images_of_one_channel(name):
    network, (x, t, _) = made(name).eval(), batch()
    expected = network(x, t)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last), t), expected, rtol=1e-4, atol=1e-4)
    assert TINY[name](1, 8)(x[:, :1], t).shape == (4, 1, 8, 8)


def test_a_resolution_that_does_not_divide_is_refused(name):
    with pytest.raises(UserError, match="resolution=9: must be a multiple of 2 for this network"):
        TINY[name](3, 9)


@pytest.mark.parametrize("name", EDM_ONLY)
def test_channels_that_do_not_divide_are_refused(name):
    with pytest.raises(UserError, match="channels=132: must divide into 32 groups"):
        TINY[name](3, 8, channels=132)


PUBLISHED = {  # millions of parameters; EDM's, with 1000 classes ADM's and EDM2's (table 6)
    "ddpmpp": 55.7,
    "ddpmpp_64": 61.8,
    "ncsnpp": 56.4,
    "ncsnpp_64": 62.8,
    "adm": 295.9,
    "edm2_xs": 124.7,
    "edm2_s": 280.2,
    "edm2_m": 497.8,
    "edm2_l": 777.5,
    "edm2_xl": 1119.3,
    "edm2_xxl": 1523.2,
}


@pytest.mark.parametrize("member, millions", PUBLISHED.items())
def test_the_configured_networks_have_the_published_numbers_of_parameters(member, millions):
    resolution = 32 if member in ("ddpmpp", "ncsnpp") else 64
    data = ["data=folder", "data.path=images", f"data.resolution={resolution}", "data.num_classes=1000"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), torch.device("meta"):
        network = instantiate(compose("train", ["~experiment", f"net={member}", *data]).net)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
