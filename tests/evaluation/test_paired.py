import pytest
import torch

from reflow_lab.evaluation.paired import feature_distance, paired_mse, paired_mse_by_band, paired_rmse, radial_bands


def waves(cycles_h: float, cycles_w: float, size: int = 32, amplitude: float = 1.0) -> torch.Tensor:
    """One image of a plane wave, (1, 1, size, size)."""
    h, w = torch.arange(size)[:, None], torch.arange(size)
    return (amplitude * torch.cos(2 * torch.pi * (cycles_h * h + cycles_w * w) / size))[None, None]


def test_rmse_of_a_constant_shift_is_the_shift() -> None:
    a = torch.rand(3, 2, 5, 5)
    shift = torch.tensor([0.0, 0.5, 1.5])
    torch.testing.assert_close(paired_rmse(a, a + shift[:, None, None, None]), shift.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(paired_rmse(a, 0 * a) ** 2, paired_mse(a, 0 * a))


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 28, 27)])
def test_bands_sum_to_the_whole_error(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    bands = paired_mse_by_band(a, b)
    assert bands.shape == (4, 3) and (bands > 0).all()
    torch.testing.assert_close(bands.sum(1), paired_mse(a, b))


@pytest.mark.parametrize(("cycles", "band"), [((0, 0), 0), ((2, 1), 0), ((0, 3), 1), ((5, 5), 1), ((0, 9), 2), ((16, 16), 2)])
def test_a_wave_lands_in_its_band(cycles: tuple[int, int], band: int) -> None:
    wave = waves(*cycles)
    found = paired_mse_by_band(wave, torch.zeros_like(wave))[0]
    assert float(found[band]) == pytest.approx(float(wave.square().mean()), rel=1e-5)
    assert float(found.sum()) == pytest.approx(float(found[band]), rel=1e-5)


def test_the_low_band_is_what_the_high_pass_filter_drops() -> None:
    assert int((radial_bands(32, 32) == 0).sum()) == 21
    assert int((radial_bands(64, 64) == 0).sum()) == 69


def test_feature_distance_is_euclidean() -> None:
    assert feature_distance(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])).tolist() == [5.0, 0.0]
