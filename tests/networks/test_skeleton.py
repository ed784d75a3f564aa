import pytest
import torch
import torch.nn.functional as F

from reflow_lab.errors import UserError
from reflow_lab.networks.skeleton import Skeleton, Stage, blur, resample


def skeleton(**changed):
    settings = {"resolution": 16, "stem": 8, "widths": [8, 24], "num_blocks": 1, "attention": [8]}
    return Skeleton(**(settings | changed))


def test_every_stage_and_its_widths():
    assert skeleton().encoder() == [
        Stage("16x16_block0", 8, 8),
        Stage("8x8_down", 8, 8, "down"),
        Stage("8x8_block0", 8, 24, attends=True),
    ]
    assert skeleton().decoder() == [
        Stage("8x8_in0", 24, 24, attends=True),
        Stage("8x8_in1", 24, 24),
        Stage("8x8_block0", 24 + 24, 24, attends=True, joins=True),
        Stage("8x8_block1", 24 + 8, 24, attends=True, joins=True),
        Stage("16x16_up", 24, 24, "up"),
        Stage("16x16_block0", 24 + 8, 8, joins=True),
        Stage("16x16_block1", 8 + 8, 8, joins=True),
    ]


def test_on_the_way_up_only_the_last_block_may_attend():
    attending = [stage.name for stage in skeleton(attends_once=True).decoder() if stage.attends]
    assert attending == ["8x8_in0", "8x8_block1"]


def test_every_skip_is_joined_once():
    made = skeleton(widths=[8, 16, 24], num_blocks=3)
    assert sum(stage.joins for stage in made.decoder()) == 1 + len(made.encoder())


def test_a_resolution_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="resolution=18: must be a multiple of 4 for this network"):
        skeleton(resolution=18, widths=[8, 8, 8])


def test_the_quick_ways_are_the_filter():
    """Means of 2 x 2 and nearest neighbours are the taps (1, 1)."""
    x = torch.randn(2, 3, 8, 8)
    kernel = blur(x, (1, 1))
    torch.testing.assert_close(resample(x, "down"), F.conv2d(x, kernel, stride=2, groups=3))
    torch.testing.assert_close(resample(x, "up"), F.conv_transpose2d(x, 4 * kernel, stride=2, groups=3))
    assert resample(x, "keep") is x


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_a_gradient_of_grey_and_halves_or_doubles_the_sides(taps):
    x = torch.arange(16.0).expand(1, 2, 16, 16)
    down, up = resample(x, "down", taps), resample(x, "up", taps)
    assert down.shape == (1, 2, 8, 8) and up.shape == (1, 2, 32, 32)
    torch.testing.assert_close(down[0, 0, 4, 1:-1], torch.arange(8.0)[1:-1] * 2 + 0.5)
    means = up[0, 0, 16].reshape(16, 2).mean(1)
    torch.testing.assert_close(means[2:-2], torch.arange(16.0)[2:-2])
    assert blur(x, taps).sum().item() == pytest.approx(2)
