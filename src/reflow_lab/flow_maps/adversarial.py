"""Adversarial fine-tuning of a flow map after its distillation (Align Your Flow, arXiv 2506.14603).

The distillation goes on as the regulariser, and a discriminator judges the flow map's jumps from noise to data. The losses are
R3GAN's (arXiv 2501.05441): each sample is judged beside a real one, with gradient penalties on both.

Which jumps the paper judges, what its alpha = beta = 0.1 weigh, and the discriminator's learning rate could not be read. Chosen
here: one jump from `t` to 0 of the same pairs; 0.1 as both penalties' gamma; as `weight` 1, since on points in the plane 0.1 did
much less in as many steps; StyleGAN2's learning rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from .. import parallel
from ..dyn.objective import Losses
from ..errors import require
from ..flow import MeanVelocity, flow_map, interpolate
from ..networks.discriminator import Discriminator
from ..training.module import FlowModule
from .distillation import Distillation

MOST_WEIGHT = 1e4  #: that the adaptive weight may reach
LAST_LAYERS = ("out_conv", "head", "layers")  #: what the last layer of a network is called, or the sequence that ends with it


class Judged(NamedTuple):
    """What a discriminator says of samples, and how steeply."""

    value: Tensor  #: D, (n,)
    squared_slope: Tensor  #: |grad_x D|^2, (n,), over all dimensions


def judged(discriminator: nn.Module, x: Tensor, label: Tensor | None) -> Judged:
    """D at x (n, ...), both results differentiable in D's weights; x counts as a constant."""
    x = x.detach().requires_grad_()
    value = discriminator(x, label)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return Judged(value, slope.flatten(1).square().sum(1))


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(fake) - D(real)), (n,): the relativistic pairing loss that the discriminator minimises."""
    return F.softplus(fake - real)


def student_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(real) - D(fake)), (n,): what the student minimises through its samples."""
    return F.softplus(real - fake)


def penalty(squared_slope: Tensor, gamma: float) -> Tensor:
    """gamma / 2 |grad D|^2, (n,): zero-centred, R1 at real samples (arXiv 1801.04406) and R2 at generated ones."""
    return gamma / 2 * squared_slope


def gradient_norm(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """|d loss / d weights|, (), of all processes' mean loss; the graph stays."""
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    return parallel.mean(torch.cat([g.detach().flatten() for g in gradients])).norm()


def adaptive_weight(regulariser: Tensor, adversarial: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The ratio, (), of the two losses' gradient norms at `weights`, the student's last layer, in [0, MOST_WEIGHT] (VQGAN).

    Times it, the adversarial loss pulls there as strongly as the regulariser. Where both pull not at all it is 0.
    """
    ours, theirs = (gradient_norm(loss, weights) for loss in (regulariser, adversarial))
    return (ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny)).clamp(max=MOST_WEIGHT)


def last_weight(network: nn.Module) -> Tensor:
    """The weight of a network's last layer. Raises a `UserError` for one that calls it none of LAST_LAYERS."""
    inner = getattr(network, "network", network)
    found = next((getattr(inner, name) for name in LAST_LAYERS if hasattr(inner, name)), None)
    last = found[-1] if isinstance(found, nn.Sequential) else found
    known = f"a network whose last layer is called one of {', '.join(LAST_LAYERS)}"
    require(isinstance(getattr(last, "weight", None), Tensor), "flow_map/adversarial", type(inner).__name__, f"needs {known}")
    assert last is not None and isinstance(last.weight, Tensor)
    return last.weight


@dataclass(frozen=True)
class Adversarial:
    """The settings of the stage.

    t: where the judged jump to data starts, None for the batch's own times. weight: of the adversarial loss, beside the adaptive
    weight. r1, r2: gamma of the penalties. lr, betas: of the discriminator's Adam (StyleGAN2's rate, R3GAN's betas). channels,
    max_channels, group_size: of the `Discriminator`.
    """

    t: float | None
    weight: float = 1.0
    r1: float = 0.1
    r2: float = 0.1
    lr: float = 2e-3
    betas: tuple[float, float] = (0.0, 0.99)
    channels: int = 64
    max_channels: int = 512
    group_size: int = 4

    def __post_init__(self) -> None:
        key = "flow_map.adversarial"
        require(self.t is None or 0 < self.t <= 1, f"{key}.t", self.t, "must lie in (0, 1], or null for the batch's own times")
        for name in ("weight", "r1", "r2"):
            require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "must be a number of at least 0")
        require(self.lr > 0, f"{key}.lr", self.lr, "must be a positive number")
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(pair, f"{key}.betas", list(self.betas), "must be two numbers in [0, 1)")
        for name in ("channels", "max_channels", "group_size"):
            whole = isinstance(getattr(self, name), int) and getattr(self, name) >= 1
            require(whole, f"{key}.{name}", getattr(self, name), "must be a whole number of at least 1")

    def discriminator(self, shape: Sequence[int], num_classes: int, seed: int) -> Discriminator:
        """A fresh one, its weights drawn from the seed. Raises a `UserError` for samples that it cannot take."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Discriminator(shape, num_classes, self.channels, self.max_channels, self.group_size)


class Adversary(L.Callback):
    """The discriminator with its own Adam, kept in the checkpoint; it logs every `every_kimg` how the last step went.

    Of several processes each has the same one, whose gradients are their mean; each trains it on its own rows.
    """

    def __init__(self, how: Adversarial, discriminator: Discriminator, last: Tensor, every_kimg: float) -> None:
        self.how, self.discriminator, self.last, self.every_kimg = how, discriminator.requires_grad_(False), last, every_kimg
        self.optimizer = Adam(discriminator.parameters(), lr=how.lr, betas=(how.betas[0], how.betas[1]))
        self.seen: dict[str, Tensor] = {}  #: of the last step, each ()

    def train(self, real: Tensor, fake: Tensor, label: Tensor | None) -> None:
        """A step of the discriminator on samples (n, ...) of the same labels."""
        self.discriminator.requires_grad_(True)
        ours, theirs = (judged(self.discriminator, x, label) for x in (real, fake))
        losses = critic_loss(ours.value, theirs.value)
        penalties = penalty(ours.squared_slope, self.how.r1) + penalty(theirs.squared_slope, self.how.r2)
        self.optimizer.zero_grad()
        torch.autograd.backward((losses + penalties).mean())
        average_gradients(self.discriminator)
        self.optimizer.step()
        self.discriminator.requires_grad_(False)
        self._see(critic_loss=losses, margin=ours.value - theirs.value, r1=ours.squared_slope, r2=theirs.squared_slope)

    def losses(self, real: Tensor, fake: Tensor, label: Tensor | None) -> Tensor:
        """The student's adversarial losses, (n,), which do not reach the discriminator's weights."""
        with torch.no_grad():
            value = self.discriminator(real, label)
        found = student_loss(value, self.discriminator(fake, label))
        self._see(student_loss=found)
        return found

    def weigh(self, regulariser: Tensor, adversarial: Tensor) -> Tensor:
        """The weight, (), of the mean adversarial loss beside the mean regulariser."""
        adaptive = adaptive_weight(regulariser, adversarial, [self.last])
        self._see(adaptive_weight=adaptive)
        return self.how.weight * adaptive

    def _see(self, **values: Tensor) -> None:
        self.seen |= {name: value.detach().mean() for name, value in values.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Log when the step crosses a multiple of the interval, and after the last step."""
        assert isinstance(pl_module, FlowModule)
        if not pl_module.crossed(self.every_kimg) and trainer.global_step < trainer.max_steps:
            return
        means = parallel.mean(torch.stack([*self.seen.values()])).tolist()
        for logger in trainer.loggers:
            logged = {f"adversarial/{name}": mean for name, mean in zip(self.seen, means, strict=True)}
            logger.log_metrics(logged, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.discriminator.load_state_dict(state_dict["discriminator"])
        self.optimizer.load_state_dict(state_dict["optimizer"])


def average_gradients(network: nn.Module) -> None:
    """Give every parameter the mean of the processes' gradients, in one message."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    mean = parallel.mean(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class FineTuning(Distillation):
    """Distillation as the regulariser, and the adversarial loss of the jump x_t -> f(x_t, t, 0), judged beside x0 of its pair.

    The adversary trains on the same samples first. Losses other than the total are the regulariser's.
    """

    def __init__(self, regulariser: Distillation, adversary: Adversary) -> None:
        super().__init__(regulariser.matching, regulariser.times, regulariser.teacher, regulariser.lam_guid)
        self.adversary = adversary

    def forward(
        self, velocity: MeanVelocity, x0: Tensor, x1: Tensor, u: Tensor, label: Tensor | None = None, step: int = 0
    ) -> Losses:
        """See `Distillation`."""
        kept = super().forward(velocity, x0, x1, u, label, step)
        t = kept.t if self.adversary.how.t is None else torch.full_like(kept.t, self.adversary.how.t)
        x_t, s = interpolate(x0, x1, t), torch.zeros_like(t)
        F = velocity(x_t, t, s, label=label, lam_guid=self.strengths(u).to(x0))
        fake = flow_map(F.to(x0.dtype), x_t, t, s)
        self.adversary.train(x0, fake, label)
        adversarial = self.adversary.losses(x0, fake, label)
        weight = self.adversary.weigh(kept.total.mean(), adversarial.mean())
        return Losses(kept.total + weight * adversarial, kept.raw, kept.t)
