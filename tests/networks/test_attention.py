import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from reflow_lab.networks import attention
from reflow_lab.networks.attention import attend, in_forward_ad, scaled_dot_product, split_heads


def by_hand(qkv, num_heads):
    """Loops over heads: channel (head, d, which) of 3 c channels."""
    n, c, h, w = qkv.shape
    parts = qkv.reshape(n, num_heads, c // 3 // num_heads, 3, h * w)
    out = []
    for head in range(num_heads):
        q, k, v = (parts[:, head, :, i] for i in range(3))
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
        out.append(v @ weights.mT)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_attention(num_heads, memory_format):
    qkv = torch.randn(2, 24, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(attend(split_heads(qkv, num_heads)), by_hand(qkv, num_heads))


def test_fused_kernels_can_take_it(monkeypatch):
    """They want the channels of a head side by side; otherwise torch falls back to the slow way in silence."""
    seen = []
    monkeypatch.setattr("reflow_lab.networks.attention.scaled_dot_product", lambda *qkv: seen.extend(qkv) or qkv[0])
    attend(split_heads(torch.randn(2, 24, 4, 4), 2))
    attend(split_heads(torch.randn(2, 24, 4, 4).to(memory_format=torch.channels_last), 2))
    assert len(seen) == 6 and {tensor.stride(-1) for tensor in seen} == {1}


def test_forward_mode_is_noticed_and_served():
    q = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    asked = []

    def attention(x):
        asked.append(in_forward_ad())
        return scaled_dot_product(x, x, x)

    _, slope = torch.func.jvp(attention, (q,), (q,))
    step = 1e-6
    expected = (attention(q * (1 + step)) - attention(q * (1 - step))) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        attention(q)
    assert asked == [True, False, False, True]


def test_a_forced_kernel_without_forward_mode_is_replaced_and_that_is_said_once(recwarn):
    attention.say_switched.cache_clear()
    q = torch.randn(1, 1, 6, 4)

    def slope():
        found = torch.func.jvp(lambda x: scaled_dot_product(x, x, x), (q,), (q,))[1]
        return found, [str(w.message) for w in recwarn.list if "forward derivative" in str(w.message)]

    expected, said = slope()
    assert said == []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = [slope(), slope()][1]
    torch.testing.assert_close(found[0], expected)
    assert found[1] == ["attention: no fused kernel has a forward derivative; Jacobian-vector products take torch's math kernel"]
