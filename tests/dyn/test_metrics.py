import contextlib
import io
import socket
import sys

import pytest
import torch

from reflow_lab.dyn import metrics
from reflow_lab.dyn.metrics import HighPass, LPIPSHuber, PseudoHuber, SquaredError, huber, low_frequencies
from reflow_lab.errors import UserError

SIZES = [(32, 32), (64, 64), (8, 8), (9, 7), (6, 11), (28, 28), (1, 1)]


def images(height: int, width: int, seed: int = 0, channels: int = 2) -> torch.Tensor:
    return torch.randn(3, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "num_low"), [(28, 9), (32, 21), (64, 69)])
def test_number_of_low_frequencies(size: int, num_low: int) -> None:
    assert int(low_frequencies(size, size, 0.1).sum()) == num_low


@pytest.mark.parametrize("size", SIZES)
def test_mask_is_symmetric_about_zero(size: tuple[int, int]) -> None:
    mask = low_frequencies(*size, 0.1)
    mirrored = mask.flip(0, 1).roll((1, 1), (0, 1))
    assert mask[0, 0] and torch.equal(mask, mirrored)


@pytest.mark.parametrize("size", SIZES)
def test_phi_is_the_full_complex_filter_and_real(size: tuple[int, int]) -> None:
    metric, x = HighPass(lam_hpf=3.0), images(*size)
    high = torch.fft.ifft2(torch.fft.fft2(x) * ~low_frequencies(*size, 0.1))
    assert high.imag.abs().max() < 1e-12
    torch.testing.assert_close(metric.phi(x), x / 4 + high.real * 3 / 4)


def test_phi_is_linear() -> None:
    metric, x, y = HighPass(lam_hpf=10.0), images(32, 32), images(32, 32, seed=1)
    torch.testing.assert_close(metric.phi(2 * x - 3 * y), 2 * metric.phi(x) - 3 * metric.phi(y))


def test_phi_is_invertible_with_gains_1_and_1_over_1_plus_lam() -> None:
    lam, size = 9.0, 12
    basis = torch.eye(size**2, dtype=torch.float64).reshape(-1, 1, size, size)
    matrix = HighPass(lam_hpf=lam, cutoff=0.2).phi(basis).flatten(1)
    gains = torch.linalg.eigvalsh(matrix)
    num_low = int(low_frequencies(size, size, 0.2).sum())
    assert 1 < num_low < size**2
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(gains[:num_low], torch.full((num_low,), 1 / (1 + lam)).double())
    torch.testing.assert_close(gains[num_low:], torch.ones(size**2 - num_low).double())


def test_phi_of_a_constant_and_of_a_checkerboard() -> None:
    metric, constant = HighPass(lam_hpf=4.0), torch.ones(1, 1, 32, 32)
    checkerboard = 1 - 2.0 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2).expand(1, 1, 32, 32)
    torch.testing.assert_close(metric.phi(constant), constant / 5)
    torch.testing.assert_close(metric.phi(checkerboard), checkerboard)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lam", [0.0, 1.0, 1000.0])
def test_parseval_loss_is_the_loss_of_phi(size: tuple[int, int], lam: float) -> None:
    metric, D, x0, t = HighPass(lam_hpf=lam), images(*size), images(*size, seed=1), torch.ones(3)
    torch.testing.assert_close(metric(D, x0, t), metric.phi(x0 - D).square().mean((1, 2, 3)))


def test_lam_zero_is_squared_error() -> None:
    D, x0, t = images(32, 32), images(32, 32, seed=1), torch.ones(3)
    expected = SquaredError()(D, x0, t)
    torch.testing.assert_close(expected, (D - x0).square().mean((1, 2, 3)))
    torch.testing.assert_close(HighPass(lam_hpf=0.0)(D, x0, t), expected)


def test_high_pass_gradient_is_phi_twice() -> None:
    metric, D, x0 = HighPass(lam_hpf=5.0), images(9, 8).requires_grad_(), images(9, 8, seed=1)
    (gradient,) = torch.autograd.grad(metric(D, x0, torch.ones(3)).sum(), D)
    torch.testing.assert_close(gradient, -2 * metric.phi(metric.phi(x0 - D)).detach() / D[0].numel())


def test_high_pass_first_used_in_inference_still_trains() -> None:
    metric, x = HighPass(lam_hpf=0.123), torch.randn(1, 1, 10, 10)
    with torch.inference_mode():
        metric(x, torch.zeros(1, 1, 10, 10), torch.ones(1))
    D = x.clone().requires_grad_()
    metric(D, torch.zeros(1, 1, 10, 10), torch.ones(1)).sum().backward()
    assert D.grad is not None


@pytest.mark.parametrize("metric", [HighPass(), LPIPSHuber()])
def test_image_metrics_refuse_points(metric) -> None:
    with pytest.raises(UserError, match=r"^dyn\.metric=\w+: needs images.*dyn/metric=squared_error$"):
        metric(torch.zeros(4, 2), torch.ones(4, 2), torch.ones(4))


def test_huber_is_its_formula_with_two_limits() -> None:
    residual = images(32, 32, channels=3)
    norm, d = residual.flatten(1).norm(dim=1), 3072
    torch.testing.assert_close(huber(residual, 0.00054), ((norm**2 + (0.00054 * d) ** 2).sqrt() - 0.00054 * d) / d)
    torch.testing.assert_close(PseudoHuber()(residual, torch.zeros_like(residual), torch.ones(3)), huber(residual, 0.00054))
    torch.testing.assert_close(huber(residual, 1e-9), norm / d)
    small = 1e-6 * residual.float()  # float32: sqrt(s + c^2) - c would be 0
    torch.testing.assert_close(huber(small, 0.00054), (1e-6 * norm).float() ** 2 / (2 * 0.00054 * d * d))


def test_only_linear_maps_preserve_the_theory() -> None:
    assert SquaredError.theory_preserving and HighPass.theory_preserving
    assert not PseudoHuber.theory_preserving and not LPIPSHuber.theory_preserving


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: HighPass(lam_hpf=-1.0), "dyn.metric.lam_hpf=-1.0"),
        (lambda: HighPass(cutoff=2.0), "dyn.metric.cutoff=2.0"),
        (lambda: PseudoHuber(0.0), "dyn.metric.c_per_dim=0.0"),
        (lambda: LPIPSHuber(net="squeeze"), "dyn.metric.net=squeeze"),
    ],
)
def test_bad_parameters_are_named(make, key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()


def test_missing_lpips_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    metrics._lpips_network.cache_clear()
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match=r"^dyn\.metric=lpips_huber: .*reflow_lab\[lpips\]"):
        LPIPSHuber()(x, x, torch.ones(1))


def test_unsupported_channels_are_named() -> None:
    x = torch.zeros(1, 2, 8, 8)
    with pytest.raises(UserError, match="1 or 3 channels, the data have 2"):
        LPIPSHuber()(x, x, torch.ones(1))


def test_lpips_huber(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stlpips_pytorch.stlpips")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    metrics._lpips_network.cache_clear()
    metric, t = LPIPSHuber(net="alex"), torch.tensor([0.25, 0.5])
    D, x0 = (0.3 * images(16, 16, seed=s, channels=1)[:2].float() for s in (0, 1))
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), torch.inference_mode():
        metric(D, x0, t)
    assert stdout.getvalue() == ""
    loss = metric(D.requires_grad_(), x0, t)
    distance = metrics.lpips(D, x0, "alex")
    torch.testing.assert_close(loss, (1 - t) * huber((x0 - D) / t[:, None, None, None], 0.00054) + distance)
    assert (distance > 0).all() and metrics.lpips(x0, x0, "alex").abs().max() == 0
    colour = metrics.lpips(D.expand(-1, 3, -1, -1), x0.expand(-1, 3, -1, -1), "alex")
    torch.testing.assert_close(colour, distance)
    loss.sum().backward()
    assert D.grad.abs().max() > 0
    assert not any(p.requires_grad for p in metrics._lpips_network("alex", torch.device("cpu")).parameters())
