"""Derivatives of every network of the lab as a flow map: exact against differences, dropped units, precision, compilation."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import jumpers
from reflow_lab.flow_maps import derivatives
from reflow_lab.flow_maps.derivatives import Exact, FiniteDifference, is_compiled, product, traceable_product
from reflow_lab.flow_maps.objectives import EMD, Matching, Point
from reflow_lab.networks.precision import EAGER_MASKS, InPrecision

H = 2.0**-14  # t, s and these steps are exact in float32, to which the features of time round


@pytest.fixture(params=jumpers.NETWORKS)
def name(request):
    return request.param


def asked(name, dtype=torch.float32, velocity=None, num=4):
    """A student with its labels, and a point with both objectives' tangents."""
    x, v, t, s, label, lam_guid = jumpers.batch(name, num, dtype)
    velocity = jumpers.made(name).to(dtype) if velocity is None else velocity
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    tangents = {"EMD": (v, one, zero), "LMD": (torch.zeros_like(x), zero, one)}
    return partial(velocity, label=label, lam_guid=lam_guid), Point(x, t, s, v), tangents


def moved(student, at, tangent, h):
    dx, dt, ds = tangent
    with torch.no_grad():
        return student(at.x_t + h * dx, at.t + h * dt, at.s + h * ds)


@pytest.mark.parametrize("objective", ["EMD", "LMD"])
def test_forward_mode_is_the_limit_of_differences(name, objective):
    """In training mode: group norms, attention and EDM2's forced weights included."""
    student, at, tangents = asked(name, torch.float64)
    tangent, before = tangents[objective], student(at.x_t, at.t, at.s)  # with which EDM2 has forced its weights
    near, far = (moved(student, at, tangent, h) - moved(student, at, tangent, -h) for h in (H, 2 * H))
    expected = (8 * near - far) / (12 * H)  # of order four
    state = {key: value.clone() for key, value in student.func.state_dict().items()}
    found = Exact()(student, at, tangent, before)
    assert all(torch.equal(value, state[key]) for key, value in student.func.state_dict().items())
    assert found.norm() > 1 and (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_product_by_our_rules_is_torchs(name, precision):
    student, at, tangents = asked(name, velocity=InPrecision(jumpers.made(name), precision).eval())
    ours, theirs = (how(student, (at.x_t, at.t, at.s), tangents["EMD"]) for how in (product, traceable_product))
    assert (ours - theirs).norm() < {"32-true": 1e-5, "bf16-mixed": 0.05}[precision] * theirs.norm()


@pytest.mark.parametrize("varied", [[i for i in range(3) if which >> i & 1] for which in range(8)], ids=str)
def test_our_rules_take_any_tangents(varied):
    """Of each argument or none, and shapes that broadcast."""
    given = [torch.randn(3, 1), torch.randn(3, 4), torch.randn(4)]
    primals = tuple(given[i] for i in varied)
    tangents = tuple(z.cos() for z in primals)

    def asked_with(*some):
        return torch.addcmul(*(some[varied.index(i)] if i in varied else given[i] for i in range(3)))

    with forward_ad.dual_level(), derivatives.ProductRules():
        F, found = forward_ad.unpack_dual(asked_with(*map(forward_ad.make_dual, primals, tangents)))
    torch.testing.assert_close(F, torch.addcmul(*given))
    if varied:
        torch.testing.assert_close(found, torch.func.jvp(asked_with, primals, tangents)[1])
    else:
        assert found is None


@pytest.mark.parametrize("objective", ["EMD", "LMD"])
def test_a_finite_difference_errs_in_proportion_to_its_step(name, objective):
    student, at, tangents = asked(name, torch.float64)
    F, tangent = student(at.x_t, at.t, at.s).detach(), tangents[objective]
    exact = Exact()(student, at, tangent, F)
    errors = [(FiniteDifference(h)(student, at, tangent, F) - exact).norm() / exact.norm() for h in (2 * H, H)]
    assert errors[1] < 0.05 and 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_a_step_in_each_precision_is_near_that_in_float64(name, precision, derivative):
    """The derivative in bfloat16 is as near as bfloat16 can be; a difference is never of numbers in bfloat16."""
    student, at, tangents = asked(name, torch.float64)
    expected = Exact()(student, at, tangents["EMD"], student(at.x_t, at.t, at.s))
    student, at, tangents = asked(name, velocity=InPrecision(jumpers.made(name), precision))
    how = Exact() if derivative == "exact" else FiniteDifference(2.0**-10, precision)
    found = how(student, at, tangents["EMD"], student(at.x_t, at.t, at.s).detach())
    error = (found - expected).norm() / expected.norm()
    assert (
        found.dtype == torch.float32
        and error < {"exact": {"32-true": 1e-4, "bf16-mixed": 0.1}[precision], "difference": 0.3}[derivative]
    )


def with_dropout(name):
    """Dropout in every network."""
    velocity = jumpers.made(name)
    for module in velocity.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return velocity


@pytest.mark.parametrize(
    ("derivative", "precision"),
    [(Exact(), "32-true"), (FiniteDifference(H), "32-true"), (FiniteDifference(2.0**-10, "bf16-mixed"), "bf16-mixed")],
)
def test_the_same_units_are_dropped_in_all_calls_of_a_step(name, derivative, precision):
    """g in training is that of the sub-network: by hand, each call under the same state of the generator."""
    velocity = InPrecision(with_dropout(name), precision).train()
    student, at, tangents = asked(name, velocity=velocity)
    torch.manual_seed(7)
    student(at.x_t, at.t, at.s)  # with which EDM2 has forced its weights
    seen = []

    def watched(*asked):
        seen.append(derivative(*asked))
        return seen[0]

    torch.manual_seed(7)
    Matching(EMD(watched), warmup_steps=0)(student, at, None, 0)
    torch.manual_seed(7)
    ahead = moved(student, at, tangents["EMD"], 2.0**-10)
    torch.manual_seed(8)
    other = moved(student, at, tangents["EMD"], 2.0**-10)
    torch.manual_seed(7)
    expected = Exact()(student, at, tangents["EMD"], ahead)
    assert (ahead - other).norm() > 0.02 * ahead.norm()
    assert (seen[0] - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("unet", marks=pytest.mark.slow), pytest.param("edm2", marks=pytest.mark.slow)]
)
def test_of_a_compiled_network_the_derivative_is_compiled_too(name, monkeypatch):
    """One graph each, called again for other labels and points; and the network's own calls stay compiled afterwards.

    They would not if the derivative called the compiled network, which torch can only run uncompiled, from then on.
    """
    torch._dynamo.reset()
    ordinary, products = (CompileCounterWithBackend("eager") for _ in range(2))
    monkeypatch.setattr(
        derivatives, "compiled_product", lambda: torch.compile(traceable_product, backend=products, fullgraph=True)
    )
    student, at, tangents = asked(name, velocity=InPrecision(with_dropout(name), "32-true").train())
    assert not is_compiled(student)
    student(at.x_t, at.t, at.s)  # with which EDM2 has forced its weights
    expected = []
    for num in (4, 3):
        torch.manual_seed(num)
        expected.append(Exact()(student, at, tangents["EMD"], at.v))
    student.func.velocity.compile(backend=ordinary)
    assert is_compiled(student)
    for num, wanted in zip((4, 3), expected, strict=True):
        student = partial(student.func, label=student.keywords["label"].clone(), lam_guid=student.keywords["lam_guid"].clone())
        student(at.x_t, at.t, at.s).sum().backward()
        torch.manual_seed(num)
        found = Exact()(student, at, tangents["EMD"], at.v)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    graphs = ordinary.frame_count
    assert products.frame_count == 1 and graphs >= 1
    with torch.no_grad():
        student(at.x_t, at.t, at.s)
    assert ordinary.frame_count > graphs  # for calls without gradient, a graph of their own


@pytest.mark.slow
def test_dropped_units_are_the_same_in_compiled_graphs():
    """Those of torch's inductor: the forward pass, with its backward pass, drops what the product does."""
    torch._dynamo.reset()
    derivatives.compiled_product.cache_clear()
    student, at, tangents = asked("mlp", velocity=InPrecision(with_dropout("mlp"), "32-true").train())
    torch.manual_seed(7)
    expected = student(at.x_t, at.t, at.s), Exact()(student, at, tangents["EMD"], at.v)
    student.func.velocity.compile(options=EAGER_MASKS)
    torch.manual_seed(7)
    found = student(at.x_t, at.t, at.s), Exact()(student, at, tangents["EMD"], at.v)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
