"""How far a Fréchet distance from N samples lies above the true one, and how much it scatters: on Gaussian images.

Their distance is known in closed form, so bias and spread can be measured, and beside them stand the first orders in 1/N, derived
here: with B the covariance of the samples, M = A^1/2 B A^1/2 that of the product with the reference's, mu its eigenvalues,
s the difference of means and T the optimal map from B to A,

    bias     = tr B / N + 1/2 sum_ij sqrt(mu_i mu_j) (1 + delta_ij) / ((sqrt mu_i + sqrt mu_j) (N - 1))
    variance = (4 s.Bs + 2 tr(((1 - T) B)^2)) / N

The bias is positive whatever the samples: distances of different N do not compare. `python -m reflow_lab.evaluation.bias FOLDER`
writes the picture and its numbers.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..artifacts import write_atomically, write_json
from ..gaussian import sqrtm_psd, w2_squared
from ..noise import normal
from .frechet import Moments, Reference

SIDE, REPEATS = 8, 40
NUMS = (100, 200, 400, 800, 1600, 3200, 6400)


class Problem(NamedTuple):
    """Gaussian images of SIDE x SIDE pixels: the real ones' covariance A, and the samples' mean s and covariance B; float64."""

    A: Tensor
    B: Tensor
    s: Tensor


class Spread(NamedTuple):
    """Estimates from so many samples: their mean above the true distance, its standard error, their standard deviation."""

    num: int
    bias: float
    error: float
    std: float


def problem(side: int = SIDE) -> Problem:
    """Images whose power falls with frequency as photographs' does; the samples are a tenth too rough, and a shade too light."""
    index = torch.arange(side**2, dtype=torch.float64)
    place = torch.stack((index // side, index % side), 1)
    decay = torch.exp(-torch.cdist(place, place) / 3)
    return Problem(
        decay, 1.1 * decay + 0.1 * torch.eye(side**2, dtype=torch.float64), torch.full((side**2,), 0.1, dtype=torch.float64)
    )


def true_distance(given: Problem) -> float:
    """W2^2 of the two Gaussians."""
    return float(w2_squared(torch.zeros_like(given.s), given.A, given.s, given.B))


def product(given: Problem) -> Tensor:
    """A^1/2 B A^1/2."""
    half = sqrtm_psd(given.A)
    return half @ given.B @ half


def predicted_bias(given: Problem, num: int) -> float:
    """The bias to first order in 1 / num."""
    r = torch.linalg.eigvalsh(product(given)).sqrt()
    pairs = torch.outer(r, r) * (1 + torch.eye(len(r), dtype=r.dtype)) / (r[:, None] + r)
    return float(given.B.trace() / num + pairs.sum() / (2 * (num - 1)))


def predicted_std(given: Problem, num: int) -> float:
    """The standard deviation to first order in 1 / num."""
    half = sqrtm_psd(given.A)
    T = half @ torch.linalg.inv(sqrtm_psd(product(given))) @ half
    rest = (torch.eye(len(T), dtype=T.dtype) - T) @ given.B
    return float(((4 * given.s @ given.B @ given.s + 2 * (rest @ rest).trace()) / num).sqrt())


def measured(given: Problem, num: int, repeats: int = REPEATS) -> Spread:
    """`repeats` estimates from `num` fresh samples each, against the exact reference."""
    reference, half, dim = Reference.given(torch.zeros_like(given.s), given.A), sqrtm_psd(given.B), len(given.s)
    found = np.empty(repeats)
    for repeat in range(repeats):
        z = normal(repeat, f"evaluation/bias/{num}", np.arange(num), (dim,)).double()
        found[repeat] = reference.distance(Moments.of(z @ half + given.s))
    std = float(found.std(ddof=1))
    return Spread(num, float(found.mean() - true_distance(given)), std / repeats**0.5, std)


def main(argv: Sequence[str]) -> None:
    """Measure, write frechet_bias.json and frechet_bias.png into a folder."""
    (folder,) = map(Path, argv)
    folder.mkdir(parents=True, exist_ok=True)
    given = problem()
    found = [measured(given, num) for num in NUMS]
    orders = [{"bias_predicted": predicted_bias(given, n), "std_predicted": predicted_std(given, n)} for n in NUMS]
    rows: list[dict[str, Any]] = [spread._asdict() | order for spread, order in zip(found, orders, strict=True)]
    about = {"true_distance": true_distance(given), "dimensions": SIDE**2, "repeats": REPEATS, "rows": rows}
    write_json(folder / "frechet_bias.json", about)
    write_atomically(folder / "frechet_bias.png", lambda path: plot(about, path))


def plot(about: dict[str, Any], path: Path) -> None:
    """Bias and spread over N, both axes logarithmic, with their first orders."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, rows = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained"), about["rows"]
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    nums = [row["num"] for row in rows]
    axes.errorbar(nums, [row["bias"] for row in rows], [1.96 * row["error"] for row in rows], fmt="o", label="bias, measured")
    axes.plot(nums, [row["bias_predicted"] for row in rows], "-", color="C0", label="bias, first order")
    axes.plot(nums, [row["std"] for row in rows], "s", color="C1", label="standard deviation, measured")
    axes.plot(nums, [row["std_predicted"] for row in rows], "--", color="C1", label="standard deviation, first order")
    axes.axhline(about["true_distance"], color="grey", lw=0.8, ls=":", label="the true distance")
    axes.set(xscale="log", yscale="log", xlabel="samples N", ylabel=f"Fréchet distance, {about['dimensions']} dimensions")
    axes.set_xticks(nums, [f"{num:,}" for num in nums])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    main(sys.argv[1:])
