"""Improvement 5, projected pairs: the coupling moved onto couplings whose marginals are data and noise, at the least transport.

Simple ReFlow (arXiv 2410.07815) projects the teacher's coupling Q01 by

    min over Gamma of  W2^2(Gamma, Q01) + lam_proj [d(Gamma_0, P0) + d(Gamma_1, P1)].

Derived, tested:

1. The two sides separate. A plan between Gamma and Q01 holds plans between their marginals, so W2^2(Gamma, Q01) is at least
   W2^2(Gamma_0, Q0) + W2^2(Gamma_1, Q1), and Gamma = (T0 x T1)#Q01 attains it, T_i the optimal map from Q_i to Gamma_i. So each
   side is moved by itself, pairs stay pairs, and the cost is at least W2^2(Q0, P0) + W2^2(Q1, P1) where the marginals are met.
   The noise of backward pairs and the images of forward ones are right by construction: there only the other side moves.
2. With d in the units of W2^2, let g(y) be -1/2 the gradient of d's first variation at Gamma_i: to first order the displacement
   to P_i that is still wanted. Where x has gone to y, stationarity reads y - x = lam g(y).
3. y <- (x + lam (y + g(y))) / (1 + lam) has that fixed point and, for d = W2^2, reaches it at once along a geodesic: it is at
   most as far from the target as g is wrong. Every step's potential is fitted where the step finds the samples, and all steps
   are kept and replayed on whatever is moved. A fixed point of the last potential alone would multiply its error by lam.

A penalty is a `Method` (`Sinkhorn`, `CriticMethod`) that fits a `Potential`, whose gradient is g. `fit` raises lam_proj.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from ..errors import require
from ..noise import batch_indices, normal, permutation
from .couplings import assignment

State = dict[str, Tensor]
Labels = Tensor | None
Draw = Callable[[int, int], tuple[Tensor, Labels]]  #: (step, n) to samples (n, ...) and labels (n,), a pure function of the step
Distance = Callable[[Tensor, Tensor], float]  #: between samples and samples of the target, (n, ...) each
CHUNK = 500  #: samples moved at a time


class Potential(Protocol):
    """What says where samples of a class should go."""

    def gradient(self, y: Tensor, label: Labels) -> Tensor:
        """g(y), like y (n, ...): the displacement to the target that is still wanted, to first order."""
        ...

    def state(self) -> State:
        """All that `Method.restore` needs, for a safetensors file."""
        ...


# Sinkhorn divergence


def squared_cost(x: Tensor, y: Tensor, label_x: Labels = None, label_y: Labels = None) -> Tensor:
    """|x_i - y_j|^2, (n, m), of x (n, ...) and y (m, ...); infinite between samples of different classes."""
    x, y = x.flatten(1), y.flatten(1)
    cost = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp_(min=0)
    return cost if label_x is None or label_y is None else cost.masked_fill_(label_x[:, None] != label_y, torch.inf)


def softmin(cost: Tensor, height: Tensor, eps: float) -> Tensor:
    """-eps log sum_j exp(height_j - cost_ij / eps), (n,), for cost (n, m)."""
    return -eps * torch.logsumexp(height - cost / eps, dim=1)


def annealed(cost: Tensor, eps: float, num_iterations: int) -> list[float]:
    """Regularisations to run through: halved from the mean cost down to eps, then `num_iterations` times eps."""
    mean = cost[cost.isfinite()].mean().item()
    halvings = max(0, math.ceil(math.log2(max(mean, eps) / eps)))
    return [*(mean / 2**k for k in range(halvings)), *[eps] * num_iterations]


def sinkhorn_potentials(cost: Tensor, log_a: Tensor, log_b: Tensor, eps: float, num_iterations: int) -> tuple[Tensor, Tensor]:
    """The dual potentials f (n,), g (m,) of entropic optimal transport, plan_ij = a_i b_j exp((f_i + g_j - cost_ij) / eps).

    Sinkhorn's iterations in the log domain (Peyre and Cuturi 2019, section 4.4); log_a (n,), log_b (m,) are the masses'
    logarithms. After the last one the plan has the masses b exactly, a up to convergence.
    """
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for e in annealed(cost, eps, num_iterations):
        f = softmin(cost, log_b + g / e, e)
        g = softmin(cost.mT, log_a + f / e, e)
    return f, g


def self_potential(cost: Tensor, log_a: Tensor, eps: float, num_iterations: int) -> Tensor:
    """The potential f = g (n,) of a law with itself, by averaged updates, which converge quickly (Feydy et al. 2019)."""
    f = torch.zeros_like(log_a)
    for e in annealed(cost, eps, num_iterations):
        f = (f + softmin(cost, log_a + f / e, e)) / 2
    return f


def masses(label_y: Labels, label_z: Labels, num_y: int, num_z: int) -> tuple[Tensor, Tensor]:
    """Masses of y (n,) and z (m,), each adding up to 1: uniform; by class, such that both have y's shares.

    A class that one of them lacks has none. So a conditional coupling keeps its classes' shares, whatever the target's are.
    """
    if label_y is None or label_z is None:
        return torch.full((num_y,), 1 / num_y), torch.full((num_z,), 1 / num_z)
    num_classes = int(max(label_y.max(), label_z.max())) + 1
    in_y, in_z = (torch.bincount(label.cpu(), minlength=num_classes).float() for label in (label_y, label_z))
    shares = in_y * (in_z > 0)
    shares = shares / shares.sum().clamp(min=1)
    return tuple((shares / count.clamp(min=1))[label.cpu()] for count, label in ((in_y, label_y), (in_z, label_z)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Barycentres:
    """T(y) = sum_j w_j(y) z_j, w = softmax_j(height_j - |y - z_j|^2 / eps): the barycentric projection at any y.

    height = log b + g / eps, from masses b and dual potential g of z (Pooladian and Niles-Weed 2021, the entropic map).
    """

    z: Tensor
    height: Tensor
    eps: float
    label: Labels

    def __call__(self, y: Tensor, label: Labels) -> Tensor:
        """T(y), like y (n, ...), within the samples' classes."""
        weights = torch.softmax(self.height - squared_cost(y, self.z, label, self.label) / self.eps, dim=1)
        return (weights @ self.z.flatten(1)).reshape(y.shape)


@dataclass(frozen=True)
class SinkhornPotential:
    """g(y) = T^yz(y) - T^yy(y) of the debiased divergence S_eps (Feydy et al. 2019), from a batch y of Gamma and z of the target.

    Derived, tested: the first variation of S_eps(Gamma, P) is f^yz - f^yy, and grad f(y) = 2 (y - T(y)) for the squared cost.
    """

    onto: Barycentres
    itself: Barycentres

    @classmethod
    def of(cls, y: Tensor, z: Tensor, label_y: Labels, label_z: Labels, eps: float, num_iterations: int) -> "SinkhornPotential":
        """Solve both transports between batches y (n, ...) and z (m, ...)."""
        a, b = (mass.to(y).log() for mass in masses(label_y, label_z, len(y), len(z)))
        _, g = sinkhorn_potentials(squared_cost(y, z, label_y, label_z), a, b, eps, num_iterations)
        f = self_potential(squared_cost(y, y, label_y, label_y), a, eps, num_iterations)
        return cls(Barycentres(z, b + g / eps, eps, label_z), Barycentres(y, a + f / eps, eps, label_y))

    def gradient(self, y: Tensor, label: Labels) -> Tensor:
        """See `Potential`."""
        return self.onto(y, label) - self.itself(y, label)

    def state(self) -> State:
        """See `Potential`."""
        held = {"z": self.onto.z, "z_height": self.onto.height, "y": self.itself.z, "y_height": self.itself.height}
        labels = {"z_label": self.onto.label, "y_label": self.itself.label}
        eps = {"eps": torch.tensor(self.onto.eps, dtype=torch.float64)}
        return {**held, **eps, **{key: label for key, label in labels.items() if label is not None}}


# Critic


def hidden(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with SiLU, for points."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes)))


def strided(channels: Sequence[int]) -> nn.Sequential:
    """Stride-2 3x3 convolutions with SiLU, flattened, for images."""
    layers = (nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()) for a, b in pairwise(channels))
    return nn.Sequential(*layers, nn.Flatten())


class Critic(nn.Module):
    """f(y, label), (n,), for samples of one shape: an MLP of points, convolutions of images, both smooth.

    Further a quadratic of every coordinate, sum_p shift_p y_p + scale_p y_p^2 / 2, which fits each one's first two moments at
    once. f starts as 0. Without normalisation layers, so that the gradient in y can be differentiated and is each sample's own.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.trunk = (hidden if len(shape) == 1 else strided)((shape[0], *widths))
        with torch.no_grad():
            num = self.trunk(torch.zeros(1, *shape)).shape[1]
        self.value = nn.Linear(num, 1, bias=False)
        self.embedding = nn.Embedding(num_classes, num) if num_classes else None
        self.shift, self.scale = (nn.Parameter(torch.zeros(*shape)) for _ in range(2))
        for module in (self.value, self.embedding):
            if module is not None:
                nn.init.zeros_(module.weight)

    def forward(self, y: Tensor, label: Labels) -> Tensor:
        """f, (n,), for y (n, *shape) and, of a conditional one, label (n,)."""
        h = self.trunk(y)
        quadratic = (self.shift * y + self.scale * y.square() / 2).flatten(1).sum(1)
        value = self.value(h)[:, 0] + quadratic
        return value if self.embedding is None else value + (self.embedding(label) * h).sum(1)


def slope(critic: nn.Module, y: Tensor, label: Labels, create_graph: bool = False) -> Tensor:
    """grad f, like y (n, ...)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        return torch.autograd.grad(critic(y, label).sum(), y, create_graph=create_graph)[0]


def dual_value(critic: nn.Module, y: Tensor, label_y: Labels, z: Tensor, label_z: Labels) -> Tensor:
    """2 E_P f - 2 E_Gamma f - E_mu |grad f|^2, (), from y of Gamma and z of P, n samples each.

    Derived, tested: its supremum d(Gamma, P) is a squared dual H^-1 distance, with -div(mu grad f) = P - Gamma; mu is half
    Gamma and half P, so that d equals W2^2 to second order near P (Benamou and Brenier), and g = grad f.
    """
    a, b = (mass.to(y) for mass in masses(label_y, label_z, len(y), len(z)))
    half = len(y) // 2
    labels = None if label_y is None or label_z is None else torch.cat((label_y[:half], label_z[half:]))
    penalty = slope(critic, torch.cat((y[:half], z[half:])), labels, create_graph=True).flatten(1).square().sum(1).mean()
    return 2 * (b @ critic(z, label_z) - a @ critic(y, label_y)) - penalty


@dataclass(frozen=True)
class CriticPotential:
    """g = grad f of a fitted `Critic`."""

    critic: nn.Module

    def gradient(self, y: Tensor, label: Labels) -> Tensor:
        """See `Potential`."""
        return slope(self.critic, y, label)

    def state(self) -> State:
        """See `Potential`."""
        return {key: value.detach() for key, value in self.critic.state_dict().items()}


# The map


class Step(NamedTuple):
    """One step of the fixed-point iteration."""

    lam: float
    potential: Potential

    def __call__(self, x: Tensor, y: Tensor, label: Labels) -> Tensor:
        """y of the next step, for samples that began as x; (n, ...) each."""
        g = self.potential.gradient(y, label)
        return y + ((x - y) + self.lam * g) / (1 + self.lam)


def prox(x: Tensor, label: Labels, steps: Sequence[Step]) -> Tensor:
    """Where the steps carry x (n, ...), which does not depend on the rest of the batch (but for rounding)."""
    y = x
    for step in steps:
        y = step(x, y, label)
    return y


class Round(NamedTuple):
    """A value of lam_proj and what it did to held-out samples; the first one, at 0, is how they were.

    `displacement` is E |y - x|^2, not per dimension; `floor` the distance between two independent draws of the target. `kept` is
    false for a last round that did not lower the distance: its steps are not in the map.
    """

    lam_proj: float
    distance: float
    displacement: float
    floor: float
    kept: bool = True


@dataclass(frozen=True)
class Projection:
    """The fitted map T, and the rounds that led to it."""

    steps: tuple[Step, ...] = ()
    rounds: tuple[Round, ...] = ()

    @property
    def reached(self) -> Round:
        """The last round that is kept."""
        return [r for r in self.rounds if r.kept][-1]

    def __call__(self, x: Tensor, label: Labels = None) -> Tensor:
        """T(x), like x (n, ...), a chunk at a time."""
        if label is None:
            return torch.cat([prox(part, None, self.steps) for part in torch.split(x, CHUNK)])
        return torch.cat([prox(*both, self.steps) for both in zip(torch.split(x, CHUNK), torch.split(label, CHUNK), strict=True)])

    def state(self) -> State:
        """The steps as a flat dictionary of tensors; `Method.load` is the inverse. The rounds are numbers, for a JSON file."""
        found: State = {}
        for i, step in enumerate(self.steps):
            found[f"{i}.lam"] = torch.tensor(step.lam, dtype=torch.float64)
            found |= {f"{i}.{key}": value.cpu().contiguous() for key, value in step.potential.state().items()}
        return found


@dataclass(frozen=True)
class HeldOut:
    """What a map is judged by: samples x (n, ...) of the source, and two draws of the target; none are fitted to."""

    x: Tensor
    label: Labels
    target: Tensor
    other: Tensor
    distance: Distance

    @cached_property
    def floor(self) -> float:
        """The distance of a perfect map, up to chance."""
        return self.distance(self.other, self.target)

    def round(self, lam: float, made: Projection) -> Round:
        """Measure a map."""
        y = made(self.x, self.label)
        moved = (y - self.x).double().flatten(1).square().sum(1).mean().item()
        return Round(lam, self.distance(y, self.target), moved, self.floor)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How potentials are fitted, and how lam_proj rises.

    Round k >= 1 has lam_proj = lam_start lam_factor^(k-1), up to lam_max, and `num_steps` potentials. It is the last one if the
    distance is within `tolerance` times the floor, or no longer falls.
    """

    lam_start: float = 1.0
    lam_factor: float = 4.0
    lam_max: float = 64.0
    tolerance: float = 1.5
    num_steps: int = 3

    def __post_init__(self) -> None:
        above = {"lam_start": 0, "lam_factor": 1, "tolerance": 0}
        for key, low in above.items():
            require(getattr(self, key) > low, f"projection.{key}", getattr(self, key), f"must be above {low}")
        require(self.lam_max >= self.lam_start, "projection.lam_max", self.lam_max, "must be at least lam_start")
        self.require_whole("num_steps")

    def require_whole(self, *keys: str) -> None:
        """Raise a `UserError` unless these are whole numbers of at least 1."""
        for key in keys:
            value = getattr(self, key)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(good, f"projection.{key}", value, "must be a whole number of at least 1")

    def lam(self, number: int) -> float:
        """lam_proj of round `number`, from 1 on."""
        return min(self.lam_start * self.lam_factor ** (number - 1), self.lam_max)

    def is_over(self, rounds: Sequence[Round]) -> bool:
        """Whether no further round is needed, or would help."""
        if not rounds:
            return False
        last = rounds[-1]
        return not last.kept or last.distance <= self.tolerance * last.floor or last.lam_proj >= self.lam_max

    @abstractmethod
    def potential(self, side: "Side", number: int, moved: Draw, last: Potential | None) -> Potential:
        """The potential of step `number` between the source, moved so far, and the target; `last` is the step's before it."""

    @abstractmethod
    def restore(self, state: State) -> Potential:
        """The potential with this state."""

    def load(self, state: State, rounds: Sequence[Round], device: torch.device | str = "cpu") -> Projection:
        """The map with this state."""
        numbers = sorted({int(key.partition(".")[0]) for key in state})
        by_step = [{k.partition(".")[2]: v.to(device) for k, v in state.items() if k.startswith(f"{i}.")} for i in numbers]
        return Projection(tuple(Step(held.pop("lam").item(), self.restore(held)) for held in by_step), tuple(rounds))


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Method):
    """d is the Sinkhorn divergence between batches of `batch_size`, of which every step takes fresh ones.

    eps = blur times the mean squared cost between them. For few dimensions, where a batch fills the space. Costs
    batch_size^2 a moved sample and step.
    """

    blur: float = 0.1
    batch_size: int = 1000
    num_iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.blur > 0, "projection.blur", self.blur, "must be above 0")
        self.require_whole("batch_size", "num_iterations")

    def potential(self, side: "Side", number: int, moved: Draw, last: Potential | None) -> Potential:
        """See `Method`."""
        (y, label_y), (z, label_z) = (draw(number, self.batch_size) for draw in (moved, side.target))
        if label_y is not None and label_z is not None:
            missing = sorted(set(label_y.tolist()) - set(label_z.tolist()))
            require(not missing, "projection.batch_size", self.batch_size, f"holds no target sample of classes {missing}")
        eps = self.blur * squared_cost(y, z).mean().item()
        return SinkhornPotential.of(y, z, label_y, label_z, eps, self.num_iterations)

    def restore(self, state: State) -> Potential:
        """See `Method`."""
        eps = state["eps"].item()
        both = (Barycentres(state[k], state[f"{k}_height"], eps, state.get(f"{k}_label")) for k in ("z", "y"))
        return SinkhornPotential(*both)


@dataclass(frozen=True, kw_only=True)
class CriticMethod(Method):
    """d is the supremum of `dual_value`, by Adam on a `Critic` that goes on from the step before.

    A step draws `pool_size` samples of the source and moves them once; each of `num_iterations` takes `batch_size` of them and
    as many of the target. The rate falls linearly from lr to 0. `widths` are the hidden layers of points; `channels` those of
    images, each of half the resolution.
    """

    lr: float = 5e-4
    betas: Sequence[float] = (0.5, 0.9)
    batch_size: int = 64
    num_iterations: int = 150
    pool_size: int = 2000
    widths: Sequence[int] = (128, 128, 128)
    channels: Sequence[int] = (32, 64, 128, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, "projection.lr", self.lr, "must be above 0")
        self.require_whole("batch_size", "num_iterations", "pool_size")
        require(self.pool_size >= self.batch_size >= 2, "projection.batch_size", self.batch_size, "must lie in [2, pool_size]")

    def critic(self, shape: Sequence[int], num_classes: int) -> Critic:
        """A fresh network for samples of this shape."""
        return Critic(shape, num_classes, self.widths if len(shape) == 1 else self.channels)

    def potential(self, side: "Side", number: int, moved: Draw, last: Potential | None) -> Potential:
        """See `Method`."""
        pool, labels = moved(number, self.pool_size)
        if isinstance(last, CriticPotential):
            critic = copy.deepcopy(last.critic)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(side.seed)
                critic = self.critic(pool.shape[1:], side.num_classes).to(pool.device)
        self.maximise(critic, side, number, pool, labels)
        return CriticPotential(critic.eval().requires_grad_(False))

    def maximise(self, critic: nn.Module, side: "Side", number: int, pool: Tensor, labels: Labels) -> None:
        """Fit the critic to the pool (n, ...) and fresh samples of the target."""
        critic.requires_grad_(True)
        optimizer = Adam(critic.parameters(), lr=self.lr, betas=(self.betas[0], self.betas[1]))
        for i in range(self.num_iterations):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - i / self.num_iterations)
            rows = torch.from_numpy(batch_indices(side.seed, f"projection/{number}", i, self.batch_size, self.pool_size))
            rows = rows.to(pool.device)
            z, label_z = side.target(number * self.num_iterations + i, self.batch_size)
            loss = -dual_value(critic, pool[rows], None if labels is None else labels[rows], z, label_z)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def restore(self, state: State) -> Potential:
        """See `Method`."""
        num_classes = len(state["embedding.weight"]) if "embedding.weight" in state else 0
        critic = self.critic(state["shift"].shape, num_classes)
        critic.load_state_dict(state)
        return CriticPotential(critic.to(state["shift"].device).eval().requires_grad_(False))


# The outer loop


@dataclass(frozen=True)
class Side:
    """One marginal to be met: draws to fit to, of what is moved and of where it should go, and what the map is judged by."""

    source: Draw
    target: Draw
    heldout: HeldOut
    seed: int
    num_classes: int = 0  #: of labels that the draws bring; 0: none


def fit(method: Method, side: Side, begun: Projection | None = None) -> Iterator[Projection]:
    """Raise lam_proj until the marginal is met, and yield the map after every round, the one before any first.

    `begun` is a map that was yielded before: what follows is then the same as if it had gone on at once.
    """
    made = begun or Projection()
    if not made.rounds:
        made = Projection((), (side.heldout.round(0.0, made),))
        yield made
    while not method.is_over(made.rounds):
        made = next_round(method, side, made)
        yield made


def next_round(method: Method, side: Side, made: Projection) -> Projection:
    """One more value of lam_proj; its steps are kept if they lower the held-out distance."""
    longer = made
    for _ in range(method.num_steps):
        longer = next_step(method, side, longer, method.lam(len(made.rounds)))
    found = side.heldout.round(method.lam(len(made.rounds)), longer)
    if found.distance < made.rounds[-1].distance:
        return Projection(longer.steps, (*made.rounds, found))
    return Projection(made.steps, (*made.rounds, found._replace(kept=False)))


def next_step(method: Method, side: Side, made: Projection, lam: float) -> Projection:
    """Fit a potential where the map has carried the samples so far, and append its step."""

    def moved(step: int, num: int) -> tuple[Tensor, Labels]:
        x, label = side.source(step, num)
        return made(x, label), label

    last = made.steps[-1].potential if made.steps else None
    potential = method.potential(side, len(made.steps), moved, last)
    return Projection((*made.steps, Step(lam, potential)), made.rounds)


# Distances between marginals


def w2_squared_exact(x: Tensor, y: Tensor) -> float:
    """W2^2 between two empirical laws of equally many samples, (n, ...) each, by an exact assignment; n up to about 2,000.

    Samples of one law have a positive distance too, which falls as n^(-2/d) for d > 4: compare with it.
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    return (x - y[assignment(x, y)]).square().sum(1).mean().item()


def directions(dim: int, num: int, seed: int = 0) -> Tensor:
    """Unit vectors (num, dim): half of them uniform on the sphere, half along coordinates, no coordinate twice before all.

    In many dimensions a law seen along a uniform direction is nearly normal, whatever it is (Diaconis and Freedman 1984), and
    shows its mean and covariance only; along a coordinate its shape is seen as well.
    """
    dense = torch.nn.functional.normalize(normal(seed, "projection/directions", np.arange(num - num // 2), (dim,)), dim=1)
    along = permutation(seed, "projection/coordinates", dim)[np.arange(num // 2) % dim]
    return torch.cat((dense, torch.eye(dim)[torch.from_numpy(along)]))


def sliced_w2_squared(x: Tensor, y: Tensor | None = None, num_directions: int = 512) -> float:
    """The mean over `directions` of W2^2 between the projections of x and of y, (n, ...) each; without y, of N(0, I).

    Per dimension: for laws that differ by a shift it is its square over d, up to the choice of directions. n is what it is
    compared at, since samples of one law have a positive distance too; the normal's n quantiles are those at (i + 1/2) / n.
    """
    along = directions(x[0].numel(), num_directions).to(x)
    ours = (x.flatten(1) @ along.mT).sort(dim=0).values
    if y is None:
        levels = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        theirs = torch.special.ndtri(levels)[:, None].to(ours)
    else:
        theirs = (y.flatten(1) @ along.mT).sort(dim=0).values
    return (ours - theirs).double().square().mean().item()
