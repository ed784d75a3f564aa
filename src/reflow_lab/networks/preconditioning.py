"""A raw network F as a velocity or a flow map: EDM's preconditioning in the flow's own variables."""

from typing import Any

import torch
from torch import Tensor, nn

from ..flow import append_dims
from .embedding import Aim


class Preconditioned(nn.Module):
    """v(x, t) = x (t - (1-t) sd^2) / S(t)^2 - (sd / S(t)) F(x / S(t), t), with S(t)^2 = t^2 + (1-t)^2 sd^2.

    This is EDM's D = c_skip y + c_out F(c_in y) (arXiv 2206.00364, equation 7) at y = x / (1-t), sigma = t / (1-t), solved
    for v = (x - D) / t; derived, tested in tests/networks/test_preconditioning.py. The first term is the velocity of data
    N(0, sd^2), and nothing is 0/0 at either end. `augment`, the augmentation labels of the images (n, augment_dim), is for
    training networks that take them.

    A network that `jumps` is told s and lam_guid too, by default t and 1, and makes it a flow map's mean velocity over [s, t]:

    u(x, t, s) = x ((s+t) (1 + sd^2) - 2 sd^2) / (S(t) (S(s) + S(t))) - (sd / S(t)) F(x / S(t), t, s, lam_guid)

    The first term is that of data N(0, sd^2), (S(s) / S(t) - 1) / (s - t) without its 0/0, and at s = t the one above: derived.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    @property
    def jumps(self) -> bool:
        """Whether it is a flow map."""
        return bool(getattr(self.network, "jumps", False))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        *,
        label: Tensor | None = None,
        lam_guid: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """See `MeanVelocity`."""
        if s is not None and not self.jumps:
            raise TypeError("this network is a velocity: it takes no second time s")
        more: dict[str, Any] = {} if augment is None else {"augment": augment}
        t = t.expand(x_t.shape[0])
        if self.jumps:
            s = t if s is None else s.expand(x_t.shape[0])
            more["aim"] = Aim(s, torch.ones_like(t) if lam_guid is None else lam_guid.to(t).expand(x_t.shape[0]))
        shaped = append_dims(t, x_t).to(x_t.dtype)
        variance = self.variance(shaped)
        scale = variance.rsqrt()
        residual = self.network(x_t * scale, t, label if getattr(self.network, "num_classes", 0) else None, **more)
        if s is None:
            skip = (shaped - (1 - shaped) * self.sigma_data**2) / variance
        else:
            arrival = append_dims(s, x_t).to(x_t.dtype)
            total = (arrival + shaped) * (1 + self.sigma_data**2) - 2 * self.sigma_data**2
            skip = total * scale / (self.variance(arrival).sqrt() + variance.sqrt())
        return x_t * skip - self.sigma_data * scale * residual.to(x_t.dtype)

    def variance(self, t: Tensor) -> Tensor:
        """S(t)^2, the variance of x_t for data N(0, sd^2)."""
        return t**2 + ((1 - t) * self.sigma_data) ** 2
