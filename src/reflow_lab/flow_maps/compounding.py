"""Why consistency models get worse with more steps and flow maps do not: theorem 3.1 of Align Your Flow, on Gaussian data.

Data N(0, c^2); an error of the jump multiplies its result by 1 + e. All samples stay Gaussian, so that W2 to the data is
|standard deviation - c|: from a recursion without sampling, and measured on what the sampler makes of a flow map that is wrong
by as much. `python -m reflow_lab.flow_maps.compounding FOLDER` writes both as theorem.json and theorem.md, and over_k.png, with
the trained models of the study in that folder beside them.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..artifacts import write_atomically, write_json
from ..evaluation.frechet import Moments, Reference
from ..evaluation.intervals import Z95, mean_interval
from ..evaluation.values import Interval
from ..flow import append_dims
from ..gaussian import Gaussian
from ..inf.grids import Uniform
from ..inf.sampler import sample
from ..inf.solvers import FlowMap
from ..noise import normal
from ..studies import results

Error = Callable[[float, float], float]  #: relative error of a jump from t to s

STD = 0.5  #: c
STEPS = (1, 2, 3, 4, 8, 16, 64, 256)
TICKS = (1, 2, 4, 8, 16, 64, 256)  #: of the picture
ROWS, DIM = 1000, 1000  #: of the samples sent through the sampler: every coordinate is one


def eta(t: float, s: float) -> float:
    """The error of the theorem's consistency model, whose jumps go to data."""
    return float(0.05 * t**0.5)


def delta(t: float, s: float) -> float:
    """The error of its flow map, the less the shorter the jump."""
    return 0.05 * (t - s)


def uniform_times(num_steps: int) -> list[float]:
    """1 down to 0."""
    return [1 - i / num_steps for i in range(num_steps + 1)]


def consistency_w2(std: float, num_steps: int, error: Error) -> float:
    """W2 after jumps to data, each renoised to the next time: V <- (1-t)^2 V + t^2, then V <- V c^2 (1 + e)^2 / S(t)^2."""
    spread, variance = spreads(std), 1.0
    for i, t in enumerate(uniform_times(num_steps)[:-1]):
        renoised = (1 - t) ** 2 * variance + t**2 if i else variance
        variance = renoised * (std * (1 + error(t, 0.0)) / spread(t)) ** 2
    return float(abs(variance**0.5 - std))


def flow_map_w2(std: float, num_steps: int, error: Error) -> float:
    """W2 after jumps from each time to the next."""
    spread, deviation = spreads(std), 1.0
    for t, s in pairwise(uniform_times(num_steps)):
        deviation *= (1 + error(t, s)) * spread(s) / spread(t)
    return float(abs(deviation - std))


def spreads(std: float) -> Callable[[float], float]:
    """S(t), the standard deviation of x_t."""
    data = Gaussian(0.0, std)
    return lambda t: float(data.spread(torch.tensor(t, dtype=torch.float64)))


@dataclass(frozen=True)
class Wrong:
    """The mean velocity of a flow map whose jumps are wrong: f = (1 + error(t, s)) times the exact one of `data`, of mean 0."""

    data: Gaussian
    error: Error

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """See `MeanVelocity`; all of a batch jump from one time to one other, s < t, as a sampler asks it."""
        assert s is not None, "a flow map that is wrong by its jumps has no velocity"
        arrived = self.data.flow_map(x_t, t, s) * (1 + self.error(t[0].item(), s[0].item()))
        return (arrived - x_t) / append_dims(s - t, x_t)


class Measured(NamedTuple):
    """W2 to the data, and its standard error."""

    value: float
    error: float


def measured_w2(std: float, num_steps: int, error: Error, gamma: float, rows: int, dim: int) -> Measured:
    """W2 of what `FlowMap(gamma)` makes of rows x dim noises, each coordinate a sample of N(0, std^2) as it should be.

    To first order its standard error is that of a standard deviation, sigma / sqrt(2 N).
    """
    z = normal(0, f"flow_maps/compounding/{num_steps}", np.arange(rows), (dim,)).double()
    velocity = Wrong(Gaussian(0.0, std), error)
    made = sample(velocity, z, solver=FlowMap(gamma), grid=Uniform(), nfe=num_steps, t_max=1.0).reshape(-1, 1)
    data = Reference.given(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), std**2, dtype=torch.float64))
    return Measured(data.distance(Moments.of(made)) ** 0.5, float(made.std() / (2 * made.numel()) ** 0.5))


def theorem(num_steps: int) -> dict[str, Any]:
    """A row of the theorem's table: both models by the recursion, and measured."""
    consistency, flow_map = (measured_w2(STD, num_steps, error, gamma, ROWS, DIM) for error, gamma in ((eta, 1.0), (delta, 0.0)))
    return {
        "steps": num_steps,
        "consistency": {"recursion": consistency_w2(STD, num_steps, eta), **consistency._asdict()},
        "flow_map": {"recursion": flow_map_w2(STD, num_steps, delta), **flow_map._asdict()},
    }


def main(argv: Sequence[str]) -> None:
    """Compute, measure and write theorem.json, theorem.md and over_k.png into a folder, and trained.md beside a study."""
    (folder,) = map(Path, argv)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"std": STD, "samples": ROWS * DIM, "rows": [theorem(num_steps) for num_steps in STEPS]}
    write_json(folder / "theorem.json", about)
    write_atomically(folder / "theorem.md", lambda path: path.write_text(markdown(about)))
    trained = results.read(folder) if (folder / results.FILE).exists() else None
    if trained is not None:
        write_atomically(folder / "trained.md", lambda path: path.write_text(trained_markdown(trained)))
    write_atomically(folder / "over_k.png", lambda path: plot(about, trained, path))


def markdown(about: dict[str, Any]) -> str:
    """The theorem's table."""
    samples = f"from {about['samples']:,} samples, ± its 95 % interval"
    lines = [
        f"W2 to data N(0, {about['std']}^2) after K steps: by the recursion, and as the sampler leaves it, {samples}.",
        "",
        "| K | consistency model | sampled | flow map | sampled |",
        "|---|---|---|---|---|",
    ]
    for row in about["rows"]:
        told = (
            f"{m['recursion']:.5f} | {m['value']:.5f} ± {Z95 * m['error']:.5f}" for m in (row["consistency"], row["flow_map"])
        )
        lines.append(f"| {row['steps']} | {' | '.join(told)} |")
    return "\n".join([*lines, ""])


def plot(about: dict[str, Any], trained: results.Result | None, path: Path) -> None:
    """W2 over K: the theorem's models, recursion and samples; beside them the trained ones, where there are some."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = 1 if trained is None else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    draw_theorem(left, about)
    if trained is not None:
        draw_trained(right[0], trained)
    for axes in (left, *right):
        axes.set(xscale="log", yscale="log", xlabel="steps K", ylabel="W2 to the data")
        axes.set_xticks(TICKS, list(map(str, TICKS)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def draw_theorem(axes: Any, about: dict[str, Any]) -> None:
    """The table, a line by the recursion and points with 95 % intervals as sampled."""
    steps = [row["steps"] for row in about["rows"]]
    for color, (key, name) in enumerate((("consistency", "consistency model"), ("flow_map", "flow map"))):
        found = [row[key] for row in about["rows"]]
        axes.plot(steps, [m["recursion"] for m in found], "-", color=f"C{color}", label=f"{name}, recursion")
        errors = [Z95 * m["error"] for m in found]
        axes.errorbar(steps, [m["value"] for m in found], errors, fmt="o", ms=4, color=f"C{color}", label=f"{name}, sampled")
    axes.set_title(f"the theorem, data N(0, {about['std']}$^2$)", fontsize=10)


def trained_w2(trained: results.Result, row: str, num_steps: int) -> list[float]:
    """W2, the root of the study's distance, of a row after so many steps, by training seed."""
    cells = {c["seed"]: c for c in results.of(trained["cells"], row, num_steps)}
    return [float(cells[seed][trained["distance"]]) ** 0.5 for seed in trained["seeds"]]


def geometric_mean(values: Sequence[float]) -> Interval:
    """The geometric mean over training seeds with the 95 % t interval of the logarithms, whose std it has: W2 is skewed."""
    value, std, low, high = mean_interval([math.log(value) for value in values])
    return Interval(math.exp(value), std, math.exp(low), math.exp(high))


def growth(trained: results.Result, row: str, first: int, last: int) -> Interval:
    """W2 after `last` steps over W2 after `first` of the same training seed, as a geometric mean."""
    both = zip(*(trained_w2(trained, row, num_steps) for num_steps in (first, last)), strict=True)
    return geometric_mean([after / before for before, after in both])


def trained_markdown(trained: results.Result) -> str:
    """The rows of the study over K, and by what factor each grew from two steps (its second number of them) to the last."""
    steps, seeds = trained["nfe"], trained["seeds"]
    first, last = steps[1 if len(steps) > 2 else 0], steps[-1]
    told = "geometric means over training seeds with 95 % intervals, the last column of ratios within a seed"
    num = f"{trained['cells'][0]['num_images']:,}"
    lines = [
        f"W2 between the moments of {num} samples and the data's after K steps, seeds {seeds[0]} to {seeds[-1]}: {told}.",
        f"Real points are {trained['cells'][0]['floor'] ** 0.5:.4f} away.",
        "",
        f"| K | {' | '.join(map(str, steps))} | from {first} to {last} |",
        f"|---{'|---' * (len(steps) + 1)}|",
    ]
    for row in trained["rows"]:
        name = row["name"]
        found = [geometric_mean(trained_w2(trained, name, num_steps)) for num_steps in steps]
        shown = [f"{m.value:.4f} ({m.low:.4f}–{m.high:.4f})" for m in found]
        ratio = growth(trained, name, first, last)
        lines.append(f"| {name} | {' | '.join(shown)} | × {ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) |")
    return "\n".join([*lines, ""])


def draw_trained(axes: Any, trained: results.Result) -> None:
    """The rows of the study: the geometric mean over training seeds of W2, with 95 % intervals over seeds."""
    cells = trained["cells"]
    for row in trained["rows"]:
        found = [geometric_mean(trained_w2(trained, row["name"], nfe)) for nfe in trained["nfe"]]
        errors = [[m.value - m.low for m in found], [m.high - m.value for m in found]]
        axes.errorbar(trained["nfe"], [m.value for m in found], errors, marker="o", ms=3, capsize=2, label=row["name"])
    axes.axhline(cells[0]["floor"] ** 0.5, color="grey", lw=0.8, ls=":", label="real points")
    axes.set_title(f"trained, {len(trained['seeds'])} seeds, {cells[0]['num_images']:,} points", fontsize=10)


if __name__ == "__main__":
    main(sys.argv[1:])
