"""Adversarial fine-tuning of a flow map after its distillation (Align Your Flow, arXiv 2506.14603).

The losses are R3GAN's (arXiv 2501.05441): each sample is judged beside a real one, with gradient penalties on both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel

MOST_WEIGHT = 1e4  #: of the adversarial loss


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
