"""A velocity in the chosen precision."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import require
from .attention import in_forward_ad

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}  #: Lightning's names
EAGER_MASKS: dict[str, Any] = {"fallback_random": True}  #: of torch.compile: it drops what calls that are not compiled drop


def require_precision(precision: str) -> None:
    """Raise a `UserError` unless the precision is one of AUTOCAST."""
    require(precision in AUTOCAST, "precision", precision, f"allowed: {', '.join(AUTOCAST)}")


_reduced = ContextVar("reduced", default=True)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, no velocity is called under autocast: for differences of two calls, which bfloat16 would drown in rounding."""
    token = _reduced.set(False)
    try:
        yield
    finally:
        _reduced.reset(token)


class InPrecision(nn.Module):
    """Call a velocity under autocast, as training under the same `precision` does; float32 in and out."""

    def __init__(self, velocity: nn.Module, precision: str) -> None:
        super().__init__()
        require_precision(precision)
        self.velocity, self.dtype = velocity, AUTOCAST[precision]

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
        """See `MeanVelocity`; augmentation labels (n, augment_dim), where given, go to a velocity that takes them."""
        more = {} if augment is None else {"augment": augment}
        call = self.velocity.forward if in_forward_ad() else self.velocity  # a compiled network has no forward derivative
        with torch.autocast(x_t.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None and _reduced.get()):
            return call(x_t, t, s, label=label, lam_guid=lam_guid, **more).to(x_t.dtype)
