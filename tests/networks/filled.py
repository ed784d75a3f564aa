"""Weights and inputs that any program can make again from names and shapes alone: no file need hold them."""

import numpy as np
import torch

from reflow_lab.noise import normal, uniform

ONE = np.zeros(1, np.int64)


def drawn(name, shape):
    """Standard normal numbers keyed by a name."""
    return normal(0, f"filled/{name}", ONE, tuple(shape))[0]


def weight(name, shape):
    """A tensor of a network, of a size that keeps activations near 1 and every path alive."""
    z = drawn(name, shape)
    if name.endswith("freqs"):
        return 6 * z
    if len(shape) >= 2:
        return z / max(1, np.prod(shape[1:])) ** 0.5
    is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gain")
    return (1.0 if is_scale else 0.0) + 0.2 * z


def inputs(case, shape, num, num_classes, augment_dim):
    """x_t (num, *shape), t (num,) from sigma = 0.002 to 80, labels and augmentation labels (num, ...), or None."""
    x = torch.stack([drawn(f"{case}/x{i}", shape) for i in range(num)])
    u = uniform(0, f"filled/{case}/t", ONE, num)[0]
    sigma = (np.log(0.002) + u * np.log(80 / 0.002)).exp()
    t = (sigma / (1 + sigma)).float()
    label = torch.arange(num) % num_classes if num_classes else None
    augment = drawn(f"{case}/augment", (num, augment_dim)) if augment_dim else None
    return x, t, label, augment
