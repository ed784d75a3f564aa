import math

import pytest
import torch

from reflow_lab.flow import T_CLAMP, sigma_from_t, t_from_sigma
from reflow_lab.networks.embedding import FourierNoise, PositionalNoise, c_noise, one_hot


def test_the_noise_label_is_edms():
    """ln(sigma) / 4, as exact as t is: a float32 t near 1 loses nothing more."""
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    torch.testing.assert_close(c_noise(t_from_sigma(sigma)), sigma.log() / 4, rtol=0, atol=1e-13)
    t = t_from_sigma(sigma).float()
    torch.testing.assert_close(c_noise(t), sigma_from_t(t.double()).log() / 4, rtol=0, atol=1e-13)


@pytest.mark.parametrize("end, inside", [(0.0, T_CLAMP), (1.0, 1 - T_CLAMP)])
def test_times_at_the_ends_count_as_the_last_ones_before(end, inside):
    t = torch.tensor([end], dtype=torch.float64, requires_grad=True)
    label = c_noise(t)
    assert label.item() == pytest.approx(c_noise(torch.tensor([inside], dtype=torch.float64)).item(), abs=1e-12)
    label.backward()
    assert t.grad.item() == 0
    assert torch.func.jvp(c_noise, (t.detach(),), (torch.ones(1, dtype=torch.float64),))[1].item() == 0


def test_positional_features():
    """Frequencies 1 to 1e-4; DDPM++ has the last one and puts sines first, ADM neither."""
    label = torch.tensor([0.7], dtype=torch.float64)
    song = PositionalNoise(6, reaches_end=True, sines_first=True)(label)[0].tolist()
    assert song == pytest.approx([math.sin(0.7 * f) for f in (1, 1e-2, 1e-4)] + [math.cos(0.7 * f) for f in (1, 1e-2, 1e-4)])
    adm = PositionalNoise(4, reaches_end=False, sines_first=False)(label)[0].tolist()
    assert adm == pytest.approx([math.cos(0.7), math.cos(0.007), math.sin(0.7), math.sin(0.007)])


def test_fourier_features():
    layer = FourierNoise(4)
    layer.freqs = torch.tensor([1.0, 3.0])
    found = layer(torch.tensor([0.1], dtype=torch.float64))[0].tolist()
    angles = (2 * math.pi * 0.1, 2 * math.pi * 0.3)
    assert found == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-7)
    assert FourierNoise(20_000).freqs.std().item() == pytest.approx(16, rel=0.05)


def test_labels_as_rows():
    like = torch.zeros(2, 7, dtype=torch.float64)
    assert torch.equal(one_hot(torch.tensor([2, 0]), 3, like), torch.tensor([[0, 0, 1], [1, 0, 0]], dtype=torch.float64))
    assert torch.equal(one_hot(None, 3, like), torch.zeros(2, 3, dtype=torch.float64))
