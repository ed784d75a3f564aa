"""Self-attention as EDM and EDM2 lay it out, through torch's fused kernels."""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def in_forward_ad() -> bool:
    """Whether a Jacobian-vector product is being computed (`torch.func.jvp` or a dual level); torch has no public word for it."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # asked while a graph is made, not in it
def notice_switch(on_gpu: bool) -> None:
    """Say so if torch would take a fused kernel here: on a GPU, or where the user allows no other."""
    enabled: Callable[[], bool] = torch.backends.cuda.math_sdp_enabled
    if on_gpu or not enabled():  # which is the switch for every device, whatever its name
        say_switched()


@functools.cache
def say_switched() -> None:
    """Say, once, what Jacobian-vector products do instead."""
    warnings.warn(
        "attention: no fused kernel has a forward derivative; Jacobian-vector products take torch's math kernel", stacklevel=4
    )


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each (n, heads, pixels, d); no fused kernel has a forward derivative."""
    if not in_forward_ad():
        return F.scaled_dot_product_attention(q, k, v)
    notice_switch(q.is_cuda)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(n, 3 c, h, w) as (n, heads, d, 3, h w): channels count heads first, then d, then query, key and value."""
    return qkv.reshape(qkv.shape[0], num_heads, -1, 3, qkv.shape[2] * qkv.shape[3])


def attend(heads: Tensor) -> Tensor:
    """What each pixel draws from all others, (n, heads, d, 3, pixels) to (n, heads d, pixels)."""
    q, k, v = heads.transpose(2, 4).contiguous().unbind(3)  # fused kernels take only channels that lie side by side
    return scaled_dot_product(q, k, v).mT.flatten(1, 2)
