"""Sums that are known: a matrix product, views, what dies before the next is made."""

import torch
from torch import nn

from reflow_lab.evaluation.memory import peak_memory_mb
from reflow_lab.networks.precision import InPrecision

CPU = torch.device("cpu")
MB = 250_000  #: float32 numbers


def test_what_lives_at_once_is_added_and_what_died_is_not():
    def make():
        a = torch.ones(2 * MB)  # 2 MB
        b = a + 1  # 4 MB
        del a
        c = b * 2  # 4 MB again
        del b
        return c.reshape(2, MB)  # a view: nothing

    made, peak = peak_memory_mb(make, None, CPU)
    assert made.shape == (2, MB) and peak == 4


def test_the_weights_count_once():
    """A hidden layer of 1000: 1 MB of input, 1 MB of output a layer; the weights and their views beside them."""
    net = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 1000))
    x = torch.zeros(250, 1000)
    with torch.inference_mode():
        _, peak = peak_memory_mb(lambda: net(x), net, CPU)
    assert abs(peak - (2 * 4.004 + 2)) < 0.01  # two weights and biases; the hidden values and the output


def test_more_images_take_more_and_the_weights_stay():
    net = InPrecision(nn.Conv2d(3, 8, 3, padding=1), "bf16-mixed")
    net.velocity.forward = lambda x, t, s, **_: nn.functional.conv2d(x, net.velocity.weight, padding=1)
    with torch.inference_mode():
        small, large = (peak_memory_mb(lambda n=n: net(torch.zeros(n, 3, 32, 32), torch.ones(n)), net, CPU)[1] for n in (50, 100))
    assert 1.9 < large / small < 2.1
