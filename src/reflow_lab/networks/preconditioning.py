"""A raw network F as a velocity: EDM's preconditioning in the flow's own variables."""

from torch import Tensor, nn

from ..flow import append_dims


class Preconditioned(nn.Module):
    """v(x, t) = x (t - (1-t) sd^2) / S(t)^2 - (sd / S(t)) F(x / S(t), t), with S(t)^2 = t^2 + (1-t)^2 sd^2.

    This is EDM's D = c_skip y + c_out F(c_in y) (arXiv 2206.00364, equation 7) at y = x / (1-t), sigma = t / (1-t), solved
    for v = (x - D) / t; derived, tested in tests/networks/test_preconditioning.py. The first term is the velocity of data
    N(0, sd^2), and nothing is 0/0 at either end. A `MeanVelocity` at s = t only: these networks take no second time.
    `augment`, the augmentation labels of the images (n, augment_dim), is for training networks that take them.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

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
        if s is not None:
            raise TypeError("this network is a velocity: it takes no second time s")
        t = t.expand(x_t.shape[0])
        shaped = append_dims(t, x_t).to(x_t.dtype)
        variance = shaped**2 + ((1 - shaped) * self.sigma_data) ** 2
        scale = variance.rsqrt()
        more = {} if augment is None else {"augment": augment}
        residual = self.network(x_t * scale, t, label if getattr(self.network, "num_classes", 0) else None, **more)
        return x_t * ((shaped - (1 - shaped) * self.sigma_data**2) / variance) - self.sigma_data * scale * residual.to(x_t.dtype)
