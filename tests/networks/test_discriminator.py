"""The discriminator: its minibatch statistics, equalised weights, projection, and second derivatives."""

import math

import pytest
import torch

from reflow_lab.errors import UserError
from reflow_lab.flow import NO_LABEL
from reflow_lab.networks.discriminator import Block, Discriminator, Leaky, Scaled, group, with_minibatch_std

IMAGES, POINTS = (1, 32, 32), (2,)


def tiny(shape, **more):
    torch.manual_seed(0)
    return Discriminator(shape, channels=8, max_channels=16, **more)


def samples(shape, n=8, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [IMAGES, (3, 16, 16), (4, 4, 4), POINTS])
def test_one_number_a_sample(shape):
    value = tiny(shape)(samples(shape))
    assert value.shape == (8,) and value.std() > 1e-3


def test_the_minibatch_std_is_that_of_each_group_averaged_over_all_else():
    x = samples((3, 2, 2), n=8).double()
    joined = with_minibatch_std(x, 4)
    assert torch.equal(joined[:, :3], x)
    for first in (0, 4):
        rows = x[first : first + 4]
        expected = sum(math.sqrt(((v - v.mean()) ** 2).mean() + 1e-8) for v in rows.flatten(1).unbind(1)) / 12
        torch.testing.assert_close(joined[first : first + 4, 3], torch.full((4, 2, 2), expected, dtype=torch.float64))


@pytest.mark.parametrize(("num", "most", "size"), [(8, 4, 4), (6, 4, 3), (7, 4, 1), (2, 4, 2), (1, 4, 1)])
def test_groups_divide_the_batch(num, most, size):
    assert group(num, most) == size
    assert with_minibatch_std(samples((5,), n=num), most).shape == (num, 6)


def test_equal_samples_have_no_spread_and_finite_slopes():
    x = samples(IMAGES, n=1).expand(4, -1, -1, -1).clone().requires_grad_()
    assert with_minibatch_std(x, 4)[:, 1].max() < 1e-3
    (slope,) = torch.autograd.grad(tiny(IMAGES)(x).sum(), x, create_graph=True)
    assert slope.isfinite().all()
    (again,) = torch.autograd.grad(slope.square().sum(), x)
    assert again.isfinite().all()


def test_a_collapsed_batch_is_seen():
    """One sample repeated among its group is told by the minibatch statistics alone."""
    discriminator, x = tiny(POINTS), samples(POINTS, n=4)
    repeated = x[:1].expand(4, -1)
    assert (discriminator(repeated)[0] - discriminator(x)[0]).abs() > 1e-4


def test_what_a_sample_is_said_to_be_depends_on_its_own_group_only():
    """So two processes that split a batch say what one says."""
    discriminator, x = tiny(IMAGES), samples(IMAGES, n=8)
    torch.testing.assert_close(discriminator(x), torch.cat([discriminator(half) for half in x.chunk(2)]))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_layers_keep_magnitude_whatever_their_width(kernel):
    torch.manual_seed(0)
    for width in (16, 256):
        layer = torch.nn.Sequential(Scaled(width, 64, *kernel), Leaky())
        x = torch.randn(64, width, *[8 for _ in kernel])
        assert layer[0].weight.std().item() == pytest.approx(1, rel=0.1)
        inner = layer(x)[..., 1:-1, 1:-1] if kernel else layer(x)
        assert inner.square().mean().sqrt().item() == pytest.approx(math.sqrt(1.04), rel=0.1)  # 2 E[leaky(z)^2] = 1 + 0.2^2


def test_a_block_is_two_convolutions_and_a_skip():
    """On a constant image away from the border the filter does nothing, so that it can be worked out by hand."""
    torch.manual_seed(0)
    block = Block(1, 1)
    with torch.no_grad():
        for layer, weight in ((block.first[0], 2.0), (block.second[0], -3.0)):
            layer.weight.zero_()
            layer.weight[0, 0, 1, 1] = weight * 3  # over sqrt(9)
        block.skip.weight.fill_(5.0)
    once = 2 * math.sqrt(2)
    twice = 0.2 * -3 * once * math.sqrt(2)
    middle = block(torch.ones(1, 1, 16, 16))[0, 0, 3, 3]
    assert middle.item() == pytest.approx((twice + 5) / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("shape", [IMAGES, POINTS])
def test_classes_come_in_by_projection(shape):
    discriminator, x = tiny(shape, num_classes=3), samples(shape)
    none = discriminator(x, torch.full((8,), NO_LABEL))
    values = [discriminator(x, torch.full((8,), k)) for k in range(3)]
    h = []
    discriminator.value.register_forward_pre_hook(lambda _, inputs: h.append(inputs[0]))
    discriminator(x, torch.zeros(8, dtype=torch.long))
    for k, value in enumerate(values):
        torch.testing.assert_close(value - none, h[0] @ discriminator.embedding.weight[k] / math.sqrt(h[0].shape[1]))
        assert (value - none).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [IMAGES, POINTS])
def test_it_can_be_differentiated_twice(shape):
    discriminator, x = tiny(shape), samples(shape, n=4).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    moved = [p.grad for name, p in discriminator.named_parameters() if name.endswith("weight")]
    assert all(g is not None and g.isfinite().all() for g in moved)
    assert discriminator.trunk[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 16), (1, 2, 2), (3, 0, 0)])
def test_images_that_do_not_halve_to_four_pixels_are_refused(shape):
    with pytest.raises(UserError, match="power of two"):
        Discriminator(shape)
