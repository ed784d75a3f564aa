"""The derivative of a mean velocity along a direction in (x, t, s): exact by forward mode, or by one difference."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import require
from ..flow import MeanVelocity, append_dims
from ..networks.precision import AUTOCAST, EAGER_MASKS, full_precision, require_precision

if TYPE_CHECKING:
    from .objectives import Point

make_dual: Callable[..., Tensor] = forward_ad.make_dual
unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual

Tangent = tuple[Tensor, Tensor, Tensor]  #: of x_t (n, ...), t (n,) and s (n,)


class Derivative(Protocol):
    """dF along a tangent."""

    def __call__(self, student: MeanVelocity, at: "Point", tangent: Tangent, F: Tensor) -> Tensor:
        """(n, ...), without gradient; F = student(x_t, t, s) is known."""
        ...


class ProductRules(TorchFunctionMode):
    """Within: forward-mode rules that leave out what a weight without tangent adds, for which torch's own compute with zeros.

    A convolution's then costs one more convolution, not two; a group norm's is one kernel instead of a dozen.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func, or the rule for it."""
        if func in (torch.conv2d, torch.conv_transpose2d):
            return convolution(func, *args, **(kwargs or {}))
        if func is torch.addcmul and not kwargs:
            return addcmul(*args)
        if func is torch.nn.functional.group_norm:
            return group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def convolution(
    func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any, **more: Any
) -> Tensor:
    """A convolution of x, perhaps with tangent, whose weight has none."""
    primal, tangent = unpack_dual(x)
    y = func(primal, weight, bias, *how, **more)
    return y if tangent is None else make_dual(y, func(tangent, weight, None, *how, **more))


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """A group norm of x, perhaps with tangent; with weights by torch's own rule.

    Without, its Jacobian (1 - 11'/m - yy'/m) / sigma is symmetric, so that the backward kernel is its forward derivative as well.
    """
    primal, tangent = unpack_dual(x)
    if tangent is None or weight is not None or bias is not None:
        return torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)
    if torch.is_autocast_enabled(x.device.type):  # under which norms are computed in float32
        primal, tangent = primal.float(), tangent.float()
    primal, tangent, (n, c) = primal.contiguous(), tangent.contiguous(), x.shape[:2]
    how = n, c, x[0, 0].numel(), num_groups
    y, mean, rstd = torch.native_group_norm(primal, None, None, *how, eps)
    backward = torch.ops.aten.native_group_norm_backward
    return make_dual(y, backward(tangent, primal, mean, rstd, None, *how, [True, False, False])[0])


def addcmul(*args: Tensor) -> Tensor:
    """a + b c, where any may have a tangent: da + db c + b dc."""
    (a, da), (b, db), (c, dc) = (unpack_dual(z) for z in args)
    y, tangent = torch.addcmul(a, b, c), da
    for dz, z in ((db, c), (dc, b)):
        if dz is not None:
            tangent = dz * z if tangent is None else torch.addcmul(tangent, dz, z)
    return y if tangent is None else make_dual(y, tangent.expand_as(y).to(y.dtype))


def product(student: MeanVelocity, primals: Tangent, tangent: Tangent) -> Tensor:
    """The Jacobian-vector product of F in (x_t, t, s), (n, ...), without gradient."""
    with torch.no_grad(), forward_ad.dual_level(), ProductRules():
        duals = [make_dual(*pair) for pair in zip(primals, tangent, strict=True)]
        F, derivative = unpack_dual(student(*duals))
        return torch.zeros_like(F) if derivative is None else derivative


def traceable_product(student: MeanVelocity, primals: Tangent, tangent: Tangent) -> Tensor:
    """`product` in the form that torch.compile takes; there the zeros cost nothing."""
    with torch.no_grad():
        derivative: Tensor = torch.func.jvp(lambda x, t, s: student(x, t, s), primals, tangent)[1]
    return derivative


@functools.cache
def compiled_product() -> Callable[..., Tensor]:
    """`product` as one graph: a compiled network inside of a product that is not would run uncompiled, for good."""
    made: Callable[..., Tensor] = torch.compile(traceable_product, options=EAGER_MASKS)
    return made


def is_compiled(student: Any) -> bool:
    """Whether a student, perhaps with its label given, is a module that `Module.compile` was called on, or has one in it."""
    while isinstance(student, functools.partial):
        student = student.func
    modules = student.modules() if isinstance(student, nn.Module) else ()
    return any(module._compiled_call_impl is not None for module in modules)


@dataclass(frozen=True)
class Exact:
    """By forward-mode automatic differentiation: one call with dual numbers, about 2 forward passes.

    Attention and normalisation of this lab's networks have forward-mode derivatives; of fused attention kernels only the math
    backend has (networks/attention.py). Where the network is compiled, so is the product.
    """

    def __call__(self, student: MeanVelocity, at: "Point", tangent: Tangent, F: Tensor) -> Tensor:
        """See `Derivative`."""
        primals = at.x_t, at.t, at.s
        if not is_compiled(student):
            return product(student, primals, tangent).to(at.x_t.dtype)
        copied = [z.clone() for z in primals]  # torch 2.15 fails to trace a view of a view with a tangent
        with torch._dynamo.config.patch(optimize_ddp=False):  # type: ignore[attr-defined]  # it splits graphs, and tangents with them
            return compiled_product()(student, tuple(copied), tangent).to(at.x_t.dtype)


@dataclass(frozen=True)
class FiniteDifference:
    """(F(x + h dx, t + h dt, s + h ds) - F) / h, in float32 or better: one more forward pass, or two if F is known in bfloat16.

    The error is h/2 times the second derivative plus rounding over h. The step goes towards the interior, where a network was
    trained: backwards in time where t + h would leave [0, 1] or s would pass t. `precision` is the training's.
    """

    h: float = 5e-3
    precision: str = "32-true"

    def __post_init__(self) -> None:
        require(0 < self.h < 0.1, "flow_map.derivative.h", self.h, "a number in (0, 0.1)")
        require_precision(self.precision)

    def __call__(self, student: MeanVelocity, at: "Point", tangent: Tangent, F: Tensor) -> Tensor:
        """See `Derivative`."""
        dx, dt, ds = tangent
        h = torch.where((at.t + self.h * dt > 1) | (at.s + self.h * ds > at.t), -self.h, self.h)
        with torch.no_grad(), full_precision():
            here = F if AUTOCAST[self.precision] is None else with_masks_kept(student, at)
            moved = student(at.x_t + append_dims(h, at.x_t) * dx, at.t + h * dt, at.s + h * ds)
        return (moved - here).to(at.x_t.dtype) / append_dims(h, at.x_t)


def with_masks_kept(student: MeanVelocity, at: "Point") -> Tensor:
    """F, after which the student's next call drops the same units: a difference of two sub-networks over h would be noise."""
    with torch.random.fork_rng([at.x_t.device] if at.x_t.is_cuda else []):
        return student(at.x_t, at.t, at.s)
