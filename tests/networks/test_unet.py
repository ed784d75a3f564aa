import copy

import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.lrn.dropout import scale_dropout
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.networks.unet import UNet


def small(**changed):
    settings = {"in_channels": 3, "resolution": 16, "channels": 16, "multipliers": (1, 2), "dropout": 0.0}
    return UNet(**(settings | changed))


def shaken(network):
    """Weights away from their zero initialisation, so that every path counts."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"patch": 1},
        {"multipliers": (1, 2, 3), "num_blocks": 2},
        {"multipliers": (1,), "patch": 4},
        {"in_channels": 1, "resolution": 32, "channels": 40, "multipliers": (1, 2, 3)},
        {"channels": 104, "multipliers": (1,)},
    ],
)
def test_shape_in_is_shape_out(changed):
    network = shaken(small(**changed))
    x = torch.randn(2, network.in_channels, network.resolution, network.resolution)
    y = network(x, torch.rand(2))
    assert y.shape == x.shape and y.isfinite().all() and y.std() > 0


def test_it_starts_at_zero():
    assert torch.equal(small()(torch.randn(2, 3, 16, 16), torch.rand(2)), torch.zeros(2, 3, 16, 16))


def test_every_parameter_is_used():
    network = shaken(small(num_classes=3, multipliers=(1, 2, 2)))
    network(torch.randn(4, 3, 16, 16), torch.rand(4), torch.tensor([0, 1, 2, 0])).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_see_each_other():
    network = shaken(small()).eval()
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


def test_labels_and_times_condition_it():
    network = shaken(small(num_classes=3)).eval()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    first, second = (network(x, t, torch.tensor([label])) for label in (0, 2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, network(x, t / 2, torch.tensor([0])))


def test_an_unconditional_network_ignores_the_label():
    model = Preconditioned(shaken(small())).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert torch.equal(model(x, t, label=torch.tensor([0, 1])), model(x, t))


@pytest.mark.parametrize("resolution", [10, 18])
def test_a_resolution_that_does_not_divide_is_refused(resolution):
    with pytest.raises(UserError, match=f"resolution={resolution}: must be a multiple of 4"):
        small(resolution=resolution)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="channels=12: must be a multiple of 8"):
        small(channels=12)


def test_it_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        network = small(num_classes=10)
    assert all(p.is_meta for p in network.parameters())
    real = small(num_classes=10)
    network.load_state_dict(real.state_dict(), assign=True)
    inputs = torch.randn(1, 3, 16, 16), torch.rand(1), torch.tensor([3])
    assert torch.equal(network.eval()(*inputs), real.eval()(*inputs))


def test_forward_mode_derivative_in_x_and_t():
    """What flow maps need: d/dt of the network along a direction, against a central difference in float64."""
    model = Preconditioned(shaken(small(resolution=8, multipliers=(1, 2)))).double().eval()
    x, v = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    t, one = torch.tensor([0.3, 0.8], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    step = 1e-3  # the time embedding is in float32, so no smaller

    _, slope = torch.func.jvp(lambda x, t: model(x, t), (x, t), (v, one))
    ahead, behind = model(x + step * v, t + step), model(x - step * v, t - step)
    expected = (ahead - behind) / (2 * step)
    assert (slope - expected).norm() < 5e-3 * expected.norm()
    assert slope.norm() > 1


def test_backward_derivative_is_the_forward_one():
    """The transposed derivative in w . (dF v), in float64."""
    model = Preconditioned(shaken(small(resolution=8))).double().eval()
    x, v, w = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    _, forward = torch.func.jvp(lambda x: model(x, t), (x,), (v,))
    (backward,) = torch.autograd.grad(model(x.requires_grad_(), t), x, w)
    torch.testing.assert_close((forward * w).sum(), (backward * v).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_it_compiles(backend):
    """Training, with its backward pass, and a Jacobian-vector product: the same numbers, and one graph each."""
    torch._dynamo.reset()
    model = Preconditioned(shaken(small(num_classes=3, resolution=8, multipliers=(1,))))
    x, t, label, twin = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 2, 1, 2]), copy.deepcopy(model)
    expected, found = model(x, t, label=label), torch.compile(twin, backend=backend, fullgraph=True)(x, t, label=label)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward(), found.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(a.grad.norm()))

    def product(x, t):
        return torch.func.jvp(lambda x, t: model(x, t, label=label), (x, t), (x, t))[1]

    model.eval()
    with torch.no_grad():
        found = torch.compile(product, backend=backend, fullgraph=True)(x, t)
        torch.testing.assert_close(found, product(x, t), rtol=1e-3, atol=1e-3)


def test_the_state_goes_to_a_network_of_other_initial_weights():
    network, other = shaken(small(num_classes=3)).eval(), shaken(small(num_classes=3)).eval()
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 2])
    assert not torch.allclose(network(*inputs), other(*inputs))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(*inputs), other(*inputs))


def test_dropout_is_changed_without_rebuilding():
    model, x, t = Preconditioned(shaken(small(dropout=0.4))), torch.randn(2, 3, 16, 16), torch.rand(2)
    assert not torch.equal(model(x, t), model(x, t))
    scale_dropout(model, 0.5)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    scale_dropout(model, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), model.eval()(x, t))
