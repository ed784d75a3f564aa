"""What a coupling is like before anything is trained on it: how straight, how far from white noise, how often it crosses.

Pure functions of pairs: x0 data and x1 noise, (n, ...); label (n,) integers or None; times (m,) in (0, 1).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..errors import require
from ..evaluation.paired import BANDS, paired_mse_by_band, radial_bands
from ..flow import MeanVelocity, interpolate
from ..inf.sampler import sample
from ..noise import uniform

MAX_DIM = 16  #: beyond this the nearest of any affordable number of pairs are not near
CHUNK = 2**22  #: numbers in the largest temporary tensor
MOST_POSTERIORS = 2000  #: points x_t at which `own_loss_shift` looks for minimisers, spread over the pairs
WHITE = {"mean": 0, "std": 1, "skewness": 0, "kurtosis": 3, "energy_mean": 1, "correlation_right": 0, "correlation_down": 0}
WHITE |= {f"power_{band}": 1 for band in BANDS}  #: what N(0, I) has


def midpoints(num_bins: int) -> Tensor:
    """The centres of equal bins of [0, 1], float64: a mean over them is the midpoint rule's integral over t."""
    return (torch.arange(num_bins, dtype=torch.float64) + 0.5) / num_bins


def pieces(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """x cut into runs of rows, of which each row needs `width` numbers of temporary memory, CHUNK a piece."""
    return torch.split(x, max(1, CHUNK // width))


@dataclass(frozen=True)
class NearestVelocity:
    """A coupling's own E[x1 - x0 | x_t]: the mean of x1 - x0 over the num_neighbours interpolants at t nearest to x_t.

    Of the same class, where the coupling has labels. Nearest-neighbour regression of the minimiser in Liu et al. 2022 (arXiv
    2209.03003), tested: the variance is that of x1 - x0 over k, the bias the velocity's change over the neighbourhood. x0, x1:
    (n, d), d at most MAX_DIM. With `leave_one_out` row i of x_t is the interpolant of pair i, which is not its own neighbour.
    """

    x0: Tensor
    x1: Tensor
    num_neighbours: int
    label: Tensor | None = None
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        flat = self.x0.ndim == 2 and self.x0.shape[1] <= MAX_DIM
        require(flat, "shape", tuple(self.x0.shape[1:]), f"neighbours need points of at most {MAX_DIM} dimensions")
        least = len(self.x0) if self.label is None else int(torch.unique(self.label, return_counts=True)[1].min())
        most = least - self.leave_one_out
        allowed = f"must lie in [1, {most}]: the smallest class has {least} pairs"
        require(1 <= self.num_neighbours <= most, "num_neighbours", self.num_neighbours, allowed)

    def neighbours(self, x_t: Tensor, t: Tensor, label: Tensor | None, rows: Tensor) -> Tensor:
        """Indices (m, k), nearest first, of the pairs nearest to x_t, (m, d), at one time t, (); rows (m,) as `leave_one_out`."""
        tree = cKDTree(self._by_class(interpolate(self.x0, self.x1, t), self.label))
        ranks = [*range(1, self.num_neighbours + self.leave_one_out + 1)]
        found = torch.from_numpy(tree.query(self._by_class(x_t, label), ranks)[1]).to(x_t.device)
        if self.leave_one_out:
            own_last = (found == rows[:, None]).int().argsort(dim=1, stable=True)
            found = found.gather(1, own_last)[:, :-1]
        return found

    def _by_class(self, x: Tensor, label: Tensor | None) -> np.ndarray:
        """Points for the tree: a coordinate far longer than the data are wide keeps classes apart."""
        if self.label is None:
            return x.double().cpu().numpy()
        assert label is not None, "a coupling with labels needs the labels of x_t"
        gap = 1e6 * max(1.0, self.x0.abs().max().item(), self.x1.abs().max().item())
        return torch.cat((x.double(), gap * label[:, None].double()), 1).cpu().numpy()

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """See `MeanVelocity`; s is omitted. Builds a tree for each distinct t."""
        assert s is None and (not self.leave_one_out or len(x_t) == len(self.x0))
        t, v, difference = t.expand(len(x_t)), torch.empty_like(x_t), self.x1 - self.x0
        for value in torch.unique(t):
            rows = (t == value).nonzero()[:, 0]
            found = self.neighbours(x_t[rows], value, None if label is None else label[rows], rows)
            means = [difference[chunk].mean(1) for chunk in pieces(found, found.shape[1] * x_t.shape[1])]
            v[rows] = torch.cat(means).to(v)
        return v


@torch.no_grad()
def straightness(
    velocity: MeanVelocity, x0: Tensor, x1: Tensor, times: Tensor, label: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """E ||x1 - x0 - v(x_t, t)||^2 per dimension at each time, float64 (m,); its mean over `midpoints` is the integral over t.

    With v = E[x1 - x0 | x_t] it is V(X0, X1) of Liu et al. 2022 (arXiv 2209.03003, straight couplings): 0 if and only if the
    interpolating lines do not meet. Another v adds E ||v - E[x1 - x0 | x_t]||^2, so a network gives an upper bound.
    """
    values = torch.zeros(len(times), dtype=torch.float64)
    for i, t in enumerate(times.tolist()):
        for rows in torch.split(torch.arange(len(x0), device=x0.device), batch_size or len(x0)):
            t_rows = x0.new_full((len(rows),), t)
            v = velocity(interpolate(x0[rows], x1[rows], t_rows), t_rows, label=None if label is None else label[rows])
            values[i] += (x1[rows] - x0[rows] - v).double().square().sum().item() / x0.numel()
    return values


def neighbour_straightness(x0: Tensor, x1: Tensor, times: Tensor, label: Tensor | None = None, num_neighbours: int = 2) -> Tensor:
    """`straightness` at its minimiser, estimated without a network, float64 (m,); x0, x1 (n, d), d at most MAX_DIM.

    Each pair is compared with the mean of its k neighbours; the variance of that mean, 1/k of the value, is divided out. What
    remains is smoothing, the squared change of the velocity over the neighbourhood, which is added and falls as (k/n)^(2/d): so
    k is small, and the mean over pairs does the averaging. Derived, tested: for x0 = x1 / 2, whose value is 0, 4,000 pairs give
    0.0003 in 2 dimensions, 0.02 in 8 and 0.05 in 16.
    """
    nearest = NearestVelocity(x0, x1, num_neighbours, label, leave_one_out=True)
    return straightness(nearest, x0, x1, times, label) * num_neighbours / (num_neighbours + 1)


def moments(chunks: Iterable[Tensor]) -> dict[str, float]:
    """mean, std, skewness, kurtosis, min and max of all numbers in the chunks, (m, ...) each, of which one is held at a time.

    Further energy_mean and energy_std, of |x|^2 / d, one number a sample. N(0, I) has 0, 1, 0, 3, and 1 and sqrt(2/d).
    """
    values, energies, low, high = torch.zeros(5).double(), torch.zeros(5).double(), math.inf, -math.inf
    for x in chunks:
        x = x.double()
        values += power_sums(x)
        energies += power_sums(x.square().flatten(1).mean(1))
        low, high = min(low, x.min().item()), max(high, x.max().item())
    energy = {f"energy_{name}": central(energies)[name] for name in ("mean", "std")}
    return central(values) | {"min": low, "max": high} | energy


def power_sums(values: Tensor) -> Tensor:
    """The sums of the powers 0 to 4 of float64 values, (5,), on the CPU."""
    values = values.flatten()
    square = values * values  # whose products are much quicker than powers
    sums = (values.new_tensor(len(values)), values.sum(), square.sum(), values.dot(square), square.dot(square))
    return torch.stack(sums).cpu()


def central(sums: Tensor) -> dict[str, float]:
    """mean, std, skewness and kurtosis (3 for a normal law) from `power_sums`; skewness and kurtosis of constants are 0."""
    m, m2, m3, m4 = (sums[1:] / sums[0]).tolist()
    variance = max(m2 - m**2, 0.0)
    third, fourth = m3 - 3 * m * m2 + 2 * m**3, m4 - 4 * m * m3 + 6 * m**2 * m2 - 3 * m**4
    unit = variance or math.inf
    return {"mean": m, "std": variance**0.5, "skewness": third / unit**1.5, "kurtosis": fourth / unit**2}


def spectrum(x: Tensor) -> dict[str, float]:
    """How far images, (n, c, h, w), are from white noise: power by radial band, correlation of neighbouring pixels.

    power_low, power_mid, power_high: the mean square of a frequency in the band (bands of `evaluation.paired`; an empty one is
    left out), 1 for N(0, I) (derived from Parseval's theorem, tested). correlation_right, correlation_down: of a pixel and the
    next, about the mean of all.
    """
    share = torch.bincount(radial_bands(*x.shape[-2:]).flatten(), minlength=len(BANDS)) / x[0, 0].numel()
    chunks = pieces(x, x[0].numel())
    power = sum(paired_mse_by_band(chunk, torch.zeros_like(chunk)).sum(0).cpu() for chunk in chunks) / (len(x) * share)
    centred = x - x.mean()
    sides = {"right": (centred[..., :-1], centred[..., 1:]), "down": (centred[..., :-1, :], centred[..., 1:, :])}
    bands = {f"power_{band}": value for band, value in zip(BANDS, power.tolist(), strict=True) if math.isfinite(value)}
    return bands | {f"correlation_{name}": cosine(*pixels) for name, pixels in sides.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    """<a, b> / (|a| |b|) of tensors of one shape; 0 where one of them is 0."""
    ab, aa, bb = ((u * v).sum(dtype=torch.float64).item() for u, v in ((a, b), (a, a), (b, b)))
    return ab / (aa * bb) ** 0.5 if aa * bb > 0 else 0.0


def index_pairs(num: int, num_pairs: int, seed: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All i < j below num if they are at most num_pairs, else that many random i != j, keyed by the seed, in `pieces`."""
    if num * (num - 1) // 2 <= num_pairs:
        i, j = torch.triu_indices(num, num, 1)
    else:
        u, v = uniform(seed, "diagnostics/pairs", np.arange(num_pairs), 2).unbind(1)
        i = (u * num).long()
        j = (i + 1 + (v * (num - 1)).long()) % num
    yield from zip(pieces(i, width), pieces(j, width), strict=True)


def share(holds: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_pairs: int, seed: int) -> float:
    """The share of `index_pairs` of the rows of x for which `holds`, of i and j, (m,) each, to bool (m,), is true."""
    require(len(x) > 1, "num", len(x), "must be at least 2: trajectories cross in pairs")
    found = [holds(i, j) for i, j in index_pairs(len(x), num_pairs, seed, x[0].numel())]
    return torch.cat(found).double().mean().item()


def reversed_share(x0: Tensor, x1: Tensor, num_pairs: int = 100_000, seed: int = 0) -> float:
    """The share of pairs i, j with <x0_i - x0_j, x1_i - x1_j> < 0; all of them up to num_pairs, else as many random ones.

    In one dimension these are exactly the trajectories that meet. A coupling that is optimal for the squared distance has none
    (cyclical monotonicity; Villani 2009, Optimal Transport, theorem 5.10), an independent one a half.
    """
    a, b = x0.flatten(1), x1.flatten(1)

    def turned(i: Tensor, j: Tensor) -> Tensor:
        return ((a[i] - a[j]) * (b[i] - b[j])).sum(1, dtype=torch.float64).cpu() < 0

    return share(turned, a, num_pairs, seed)


def crossing_share(x0: Tensor, x1: Tensor, num_pairs: int = 100_000, seed: int = 0) -> float:
    """The share of pairs of trajectories, segments from x1 to x0 in the plane, (n, 2), that cross; pairs as in `reversed_share`.

    The ends of each lie strictly on both sides of the other's line (signs of orientations in float64), so a common end is no
    crossing. They may pass the place at different times, so that x_t still determines the pair: see `straightness` for that.
    """
    require(x0.shape[1:] == (2,), "shape", tuple(x0.shape[1:]), "crossings are counted in the plane, shape (2,)")
    a, b = x0.double().cpu(), x1.double().cpu()

    def parted(i: Tensor, j: Tensor) -> Tensor:
        """Whether the line through segment i parts the ends of segment j."""
        return turn(a[i], b[i], a[j]) * turn(a[i], b[i], b[j]) < 0

    return share(lambda i, j: parted(i, j) & parted(j, i), x0, num_pairs, seed)


def turn(start: Tensor, end: Tensor, point: Tensor) -> Tensor:
    """On which side of the line from `start` to `end` a point lies, (m, 2) each: 1 left, -1 right, 0 on it; (m,)."""
    along, to = (end - start).unbind(1), (point - start).unbind(1)
    return (along[0] * to[1] - along[1] * to[0]).sign()


def log_minimiser(samples: Tensor, eps: float, num_iterations: int = 50) -> Tensor:
    """Where descent of E log(|x0 - D|^2 / d + eps) from the mean ends, (n, d); samples of x0 (n, k, d).

    D becomes the mean with weights 1 / (l + eps), which never raises the value, as log is concave. The end is stationary, not
    always the lowest. Derived, tested.
    """
    centre = samples.mean(1, keepdim=True)
    for _ in range(num_iterations):
        weight = 1 / ((samples - centre).square().mean(2, keepdim=True) + eps)
        centre = (weight * samples).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return centre[:, 0]


def own_loss_shift(
    x0: Tensor, x1: Tensor, times: Tensor, num_neighbours: int, eps: float = 1e-4, label: Tensor | None = None
) -> dict[str, list[float]]:
    """How far `dyn.weights.LossNormalisation` moves the minimiser from E[x0 | x_t], at each time; x0, x1 (n, d), d <= MAX_DIM.

    Root mean squares per dimension, x0 given x_t being that of the neighbours (see `NearestVelocity`); derived, tested:
    shift       from the mean to `log_minimiser`; the draw of the neighbours adds to it (k = 64: 0.15 of a normal law's spread)
    common      the part that two halves of the neighbours agree on; too low where equal peaks make them choose differently
    spread      standard deviation of x0 given x_t; ratio is shift / spread
    resolution  distance of the neighbours from x_t: a spread of no more than this is smoothing
    """
    require(num_neighbours >= 4, "num_neighbours", num_neighbours, "must be at least 4: two halves of two")
    nearest = NearestVelocity(x0.double(), x1.double(), num_neighbours, label)
    found = [own_loss_at(nearest, t, eps) for t in times.to(nearest.x0)]
    return {name: [at[name] for at in found] for name in found[0]}


def own_loss_at(nearest: NearestVelocity, t: Tensor, eps: float) -> dict[str, float]:
    """`own_loss_shift` at one time, ()."""
    x_t = interpolate(nearest.x0, nearest.x1, t)
    rows = torch.arange(0, len(x_t), -(-len(x_t) // MOST_POSTERIORS), device=x_t.device)
    found = nearest.neighbours(x_t[rows], t, None if nearest.label is None else nearest.label[rows], rows)
    sums = x_t.new_zeros(4)
    for near, x in zip(*(pieces(v, found.shape[1] * x_t.shape[1]) for v in (found, x_t[rows])), strict=True):
        samples = nearest.x0[near]
        parts = (samples, samples[:, ::2], samples[:, 1::2])
        shift, one, other = (log_minimiser(part, eps) - part.mean(1) for part in parts)
        distance = (x_t[near] - x[:, None]).square().mean(1)
        sums += torch.stack([v.sum() for v in (shift.square(), one * other, samples.var(1), distance)])
    shift, common, spread, resolution = (sums / x_t[rows].numel()).clamp(min=0).sqrt().tolist()
    ratio = shift / spread if spread else 0.0
    return {"shift": shift, "common": common, "spread": spread, "ratio": ratio, "resolution": resolution}


def rectification_bias(
    velocity: MeanVelocity,
    x0: Tensor,
    x1: Tensor,
    target: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor | float],
    label: Tensor | None = None,
    batch_size: int | None = None,
    **sampling: Any,
) -> dict[str, float]:
    """What one rectification adds to the distance from the data: bias = flow - coupling.

    coupling is distance(x0, target), flow is distance(samples, target), the samples made from the coupling's own x1 by the
    velocity trained on it; `sampling` is `inf.sampler.sample`'s solver, grid, nfe and t_max. An exact velocity keeps the
    marginals (Liu et al. 2022, arXiv 2209.03003, marginal-preserving property), so with many steps the bias is the training's
    error alone.
    """
    rows = torch.split(torch.arange(len(x1), device=x1.device), batch_size or len(x1))
    flow = torch.cat([sample(velocity, x1[r], label=None if label is None else label[r], **sampling) for r in rows])
    before, after = float(distance(x0, target)), float(distance(flow, target))
    return {"coupling": before, "flow": after, "bias": after - before}


def diagnose(
    x0: Tensor,
    x1: Tensor,
    label: Tensor | None = None,
    velocity: MeanVelocity | None = None,
    *,
    num_bins: int = 8,
    num_neighbours: int = 64,
    num_pairs: int = 100_000,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """All that applies to these pairs, as plain numbers for JSON; `table` prints it.

    Always `moments` and `reversed_share`; of images `spectrum`; of points `neighbour_straightness` and `own_loss_shift` up to
    MAX_DIM dimensions, `crossing_share` in the plane; with a velocity its `straightness`. num_neighbours is for `own_loss_shift`.
    """
    both, times = {"x0": x0, "x1": x1}, midpoints(num_bins)
    found: dict[str, Any] = {"num": len(x0), "shape": list(x0.shape[1:]), "times": times.tolist()}
    found["moments"] = {name: moments(pieces(x, x[0].numel())) for name, x in both.items()}
    found["reversed_share"] = reversed_share(x0, x1, num_pairs, seed)
    if x0.ndim == 4:
        found["spectrum"] = {name: spectrum(x) for name, x in both.items()}
    if x0.shape[1:] == (2,):
        found["crossing_share"] = crossing_share(x0, x1, num_pairs, seed)
    if x0.ndim == 2 and x0.shape[1] <= MAX_DIM:
        found["neighbour_straightness"] = with_mean(neighbour_straightness(x0, x1, times, label))
        found["own_loss"] = own_loss_shift(x0, x1, times, num_neighbours, label=label)
    if velocity is not None:
        found["straightness"] = with_mean(straightness(velocity, x0, x1, times, label, batch_size))
    return found


def with_mean(values: Tensor) -> dict[str, Any]:
    """Values by time, (m,), and their mean."""
    return {"by_time": values.tolist(), "mean": values.mean().item()}


def table(found: dict[str, Any]) -> str:
    """What `diagnose` found, in lines of at most 80 characters."""
    marginals = {name: values | found.get("spectrum", {}).get(name, {}) for name, values in found["moments"].items()}
    lines = [f"{found['num']} pairs of shape {tuple(found['shape'])}", "", *beside_white(marginals, found["shape"])]
    straight = {name: found[name] for name in ("straightness", "neighbour_straightness") if name in found}
    scalars = {name: found[name] for name in ("reversed_share", "crossing_share") if name in found}
    lines += ["", *(row(name, value) for name, value in (scalars | {k: v["mean"] for k, v in straight.items()}).items())]
    short = {"straightness": "straight", "neighbour_straightness": "by k-NN"}
    columns = {short[name]: values["by_time"] for name, values in straight.items()} | found.get("own_loss", {})
    by_time = zip(found["times"], *columns.values(), strict=True) if columns else ()
    lines += ["", row("t", *columns, width=5)] if columns else []
    return "\n".join(lines + [row(f"{t:.3f}", *values, width=5) for t, *values in by_time])


def beside_white(marginals: Mapping[str, Mapping[str, float]], shape: Sequence[int]) -> list[str]:
    """Lines of the same numbers of several marginals, one a column, and what N(0, I) has of samples of this shape."""
    white = WHITE | {"energy_std": (2 / math.prod(shape)) ** 0.5}
    names = next(iter(marginals.values()))
    lines = [row(name, *(values[name] for values in marginals.values()), white.get(name, "")) for name in names]
    return [row("", *marginals, "N(0, I)"), *lines]


def row(name: str, *values: float | str, width: int = 24) -> str:
    """One line: a name in `width` characters, and the values in ten each."""
    return f"{name:<{width}}" + "".join(
        f"{v if isinstance(v, str) else format(v, '.3g'):>{10 + (v == 'resolution')}}" for v in values
    )
