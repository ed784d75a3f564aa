"""There and back: a backward pair's image leads forward to its noise, a forward pair's noise back to its image.

As exactly as the solver: on a Gaussian in closed form the whole way through `sample` and `invert`; on the quickstart's network
between T_MIN and t_max, since what the last step to t = 0 removes, noise of sigma 0.002, no inversion brings back.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

import reflow_lab
from reflow_lab.data.fashion import FashionMNIST
from reflow_lab.flow import T_MAX, T_MIN, interpolate
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import EDM, Sigmoid, Uniform
from reflow_lab.inf.sampler import invert, sample
from reflow_lab.inf.solvers import DPM, Euler, Heun, HeunSigma
from reflow_lab.noise import normal


def rms(x):
    return x.square().mean().sqrt().item()


def orders(errors):
    """Observed orders of convergence when the number of steps doubles."""
    return [np.log2(a / b) for a, b in pairwise(errors)]


CASES = [
    (Euler(), Uniform(), 0.9),
    (Heun(), Uniform(), 1.9),
    (Heun(), Sigmoid(), 1.9),
    (HeunSigma(), EDM(), 1.9),
    (DPM(), Sigmoid(), 1.9),
]


@pytest.mark.parametrize(("solver", "grid", "order"), CASES, ids=[f"{type(s).__name__}-{type(g).__name__}" for s, g, _ in CASES])
def test_on_a_gaussian_both_ways_return_to_the_order_of_the_solver(solver, grid, order):
    law = Gaussian(0.3, 0.5)
    x1 = normal(0, "test", np.arange(64), (4,)).double()
    x0 = 0.3 + 0.5 * normal(1, "test", np.arange(64), (4,)).double()
    noise, image = [], []
    for steps in (20, 40, 80):
        calls = (steps, steps) if isinstance(solver, Euler) else (2 * steps - 1, 2 * steps)  # backward ends with an Euler step
        there, back = ({"solver": solver, "grid": grid, "nfe": nfe} for nfe in calls)
        noise.append(rms(invert(law, sample(law, x1, **there), **back) - x1))
        image.append(rms(sample(law, invert(law, x0, **back), **there) - x0))
    for errors in (noise, image):
        seen = [a for a, error in zip(orders(errors), errors[1:], strict=True) if error > 2e-5]  # below: T_MIN, not the solver
        assert seen and min(seen) > order and errors[-1] < errors[0]


def test_on_the_quickstarts_network_both_ways_return_to_the_order_of_the_solver():
    velocity = reflow_lab.load("package:fashion_mnist.safetensors")
    x0, _ = FashionMNIST(channels=1, resolution=32, num_classes=10).split("train").take(np.arange(2))
    x1 = normal(0, "test", np.arange(2), (1, 32, 32))
    start = interpolate(x0, x1, torch.tensor(T_MIN))  # on the path: where forward pairs with start noise begin
    noise, image = [], []
    with torch.inference_mode():
        for steps in (18, 36, 72):
            down = EDM()(steps, T_MAX)[:-1]  # t_max to T_MIN
            up, solver = down.flip(0), HeunSigma()
            noise.append(rms(solver(velocity, solver(velocity, T_MAX * x1, down), up) / T_MAX - x1))
            image.append(rms(solver(velocity, solver(velocity, start, up), down) - start))
    assert min(orders(noise)) > 1.8 and noise[-1] < 3e-3
    assert min(orders(image)) > 1.5 and image[-1] < 6e-4
