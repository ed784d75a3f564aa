"""What a student does to the same noise as its teacher: errors by sample, in pixels, by frequency, in features."""

import torch
from torch import Tensor

BANDS = ("low", "mid", "high")
# Cycles a pixel. 0.05 * sqrt(2) is the high-pass filter's radius, 2.26 bins at 32 pixels (Simple ReFlow, arXiv 2410.07815,
# improvement 3).
BAND_EDGES = (0.05 * 2**0.5, 0.25)


def paired_mse(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared error of each sample, float64 (n,), in units of [-1, 1] squared; a, b (n, ...).

    Average it over samples, and take the root of that, for the error of a set: `paired_rmse` of samples averages less.
    """
    return (a.double() - b.double()).square().flatten(1).mean(1)


def paired_rmse(a: Tensor, b: Tensor) -> Tensor:
    """The root mean squared error of each sample, float64 (n,), in units of [-1, 1]; a, b (n, ...).

    It rewards blur (the mean of what is possible has the least error), so it is a diagnostic and no measure of quality.
    """
    return paired_mse(a, b).sqrt()


def radial_bands(height: int, width: int) -> Tensor:
    """The band of each bin of a 2-D FFT, int64 (height, width): 0 low, 1 mid, 2 high, by distance from frequency 0."""
    radius = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64))
    return torch.bucketize(radius, torch.tensor(BAND_EDGES, dtype=torch.float64), right=True)


def paired_mse_by_band(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's mean squared error split among BANDS, float64 (n, 3); a row sums to `paired_mse` (Parseval).

    a, b: images (n, c, h, w).
    """
    power = torch.fft.fft2(a.double() - b.double(), norm="ortho").abs().square().mean(1).flatten(1)
    bands = radial_bands(*a.shape[-2:]).flatten().to(power.device)
    sums = power.new_zeros(len(power), len(BANDS)).index_add_(1, bands, power)
    return sums / power.shape[1]


def feature_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """The Euclidean distance of each sample's two feature vectors, float64 (n,); features (n, d)."""
    return (features_a.double() - features_b.double()).norm(dim=1)
