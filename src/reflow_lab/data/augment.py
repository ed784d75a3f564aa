"""Images changed at random as they are drawn: mirrored, or augmented with labels that tell the network what was done.

Non-leaking augmentation (Karras et al. 2022, EDM, arXiv 2206.00364, appendix F.2): the network is trained on changed images
and told by nine labels what was done to each; sampling gives none, which means an unchanged image, so the changes do not leak
into samples. The changes, their order and probabilities, and the labels are those of EDM's published networks.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ..noise import Indices, normal, uniform

AUGMENT_DIM = 9  #: x-flip, y-flip, scale, rotation (2), anisotropic scaling (2), translation (2)
SCALE_STD = 0.2  #: of log2 of the factors
SHIFT_STD = 0.125  #: of the translation, in widths and heights of the image
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)  #: Daubechies' low-pass filter of six vanishing moments that is nearest to symmetric
CENTRE = 5  #: its largest tap, where a sample of twice the resolution stands on one of the image
MARGIN = 3  #: pixels around the image that the filter reaches into
CHUNK = {"cpu": 2**20, "cuda": 2**26}  #: numbers in the largest temporary tensor: on a CPU it stays in the cache


@dataclass(frozen=True)
class Changes:
    """What is done to n images, in this order, float64 (n,) each, 0 where nothing is: flips 0 or 1, angles in radians.

    Scaling by 2^(0.2 scale); rotation; scaling by 2^(0.2 stretch) along the direction `axis` and by its inverse across it;
    translation by right and down, in units of an eighth of width and height. The four make one map, applied once.
    """

    flip_x: Tensor
    flip_y: Tensor
    scale: Tensor
    rotation: Tensor
    stretch: Tensor
    axis: Tensor
    right: Tensor
    down: Tensor

    def labels(self) -> Tensor:
        """EDM's nine labels, float32 (n, 9), all 0 for an unchanged image and continuous in what is done."""
        turned = (self.rotation.cos() - 1, self.rotation.sin())
        stretched = (self.stretch * self.axis.cos(), self.stretch * self.axis.sin())
        columns = (self.flip_x, self.flip_y, self.scale, *turned, *stretched, self.right, self.down)
        return torch.stack(columns, dim=1).float()

    def inverse(self, height: int, width: int) -> Tensor:
        """The map from places in the changed image to places in the image, float64 (n, 2, 3); origin in the centre, pixels."""
        grown, stretched = torch.exp2(-SCALE_STD * self.scale), torch.exp2(-SCALE_STD * self.stretch)
        linear = grown[:, None, None] * turn(self.rotation) @ turn(-self.axis)
        linear = linear @ torch.diag_embed(torch.stack((stretched, 1 / stretched), dim=1)) @ turn(self.axis)
        shift = SHIFT_STD * torch.stack((width * self.right, height * self.down), dim=1)
        return torch.cat((linear, -linear @ shift[:, :, None]), dim=2)

    def moved(self) -> Tensor:
        """Which images need more than flips, bool (n,)."""
        return (torch.stack((self.scale, self.rotation, self.stretch, self.right, self.down)) != 0).any(dim=0)


def turn(angle: Tensor) -> Tensor:
    """Rotation matrices [[cos, -sin], [sin, cos]], (n, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, -sin, sin, cos), dim=1).reshape(-1, 2, 2)


def drawn(probability: float, coins: Tensor, sizes: Tensor) -> Changes:
    """The changes that uniform `coins` (n, 10) in (0, 1) and normal `sizes` (n, 4) decide on; each is made with `probability`.

    Only the x-flip differs: it is always considered, as mirror images are as good as any. Half of all considered flips are
    made, and half of the anisotropic scalings are along an axis of the image.
    """
    gates = coins[:, :6] < torch.tensor([probability] * 5 + [0.5], dtype=coins.dtype)
    yflip, scaled, turned, stretched, moved, tilted = gates.double().unbind(1)
    heads = (coins[:, 6:8] < 0.5).double()
    angles = (2 * coins[:, 8:] - 1) * torch.pi
    scale, stretch, right, down = sizes.double().unbind(1)
    return Changes(
        flip_x=heads[:, 0] * (probability > 0),
        flip_y=heads[:, 1] * yflip,
        scale=scale * scaled,
        rotation=angles[:, 0] * turned,
        stretch=stretch * stretched,
        axis=angles[:, 1] * tilted,
        right=right * moved,
        down=down * moved,
    )


def flipped(images: Tensor, which: Tensor, dim: int) -> Tensor:
    """Images (n, c, h, w), those for which `which` (n,) is not 0 mirrored along `dim`."""
    mask = (which != 0).to(images.device)[:, None, None, None]
    return torch.where(mask, images.flip(dim), images)


def changed(images: Tensor, changes: Changes) -> Tensor:
    """Images (n, c, h, w), float32, as the changes say; those that are only flipped keep their values bit for bit."""
    images = flipped(flipped(images, changes.flip_x, 3), changes.flip_y, 2)
    rows = changes.moved().nonzero()[:, 0]
    if not len(rows):
        return images
    inverse = changes.inverse(*images.shape[2:])[rows]
    where = rows.to(images.device)
    return images.index_copy(0, where, resampled(images[where], inverse))


def resampled(images: Tensor, inverse: Tensor) -> Tensor:
    """Images (n, c, h, w) mapped by `inverse` (n, 2, 3), anti-aliased: upsample, sample bilinearly, low-pass and downsample.

    Both filters are SYM6, whose even shifts are orthonormal: the identity changes nothing but the last bits. Beyond its
    edges an image goes on as its reflection, once. EDM's code reflects only as far as the images of a batch together need;
    measured at 32 pixels, 200 images with all changes likely: within 1e-4 of it one by one, 2e-5 in a batch.
    """
    size = max(1, CHUNK.get(images.device.type, 2**20) // (36 * images[0].numel()))
    pieces = zip(torch.split(images, size), torch.split(inverse.to(images.device), size), strict=True)
    return torch.cat([_resampled(*piece) for piece in pieces])


def _resampled(images: Tensor, inverse: Tensor) -> Tensor:
    height, width = images.shape[2:]
    (up_y, down_y), (up_x, down_x) = filters(height, images.device), filters(width, images.device)
    fine = up_y @ images @ up_x.mT
    grid = places(inverse, height, width).float()
    return down_y @ grid_sample(fine, grid, "bilinear", "zeros", align_corners=False) @ down_x.mT


def places(inverse: Tensor, height: int, width: int) -> Tensor:
    """Where each sample before downsampling looks into the upsampled image, (n, 2 (h + 6), 2 (w + 6), 2) for `grid_sample`.

    A place q, in pixels from the centre, is the upsampled image's pixel 2 q + 3 side - 3, as its pixel 2i is the padded image's
    i; `grid_sample` counts pixels of 6 side - 4 from -1 to 1.
    """
    ends = inverse.new_tensor([width, height])
    x, y = (torch.arange(2 * side + 4 * MARGIN).to(inverse) / 2 - MARGIN - (side - 1) / 2 for side in (width, height))
    here = torch.cartesian_prod(y, x).flip(1)
    there = here @ inverse[:, :, :2].mT + inverse[:, None, :, 2]
    return ((4 * there - 1) / (6 * ends - 4)).reshape(len(inverse), len(y), len(x), 2)


@functools.lru_cache(maxsize=8)
def filters(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reflect and upsample one dimension by two, (2 (3 side - 2), side); downsample, (side, 2 (side + 6)), as matrices."""
    reflected = np.pad(np.eye(side), ((side - 1, side - 1), (0, 0)), "reflect")
    up = lowpass(len(reflected)).T @ reflected
    down = lowpass(side + 2 * MARGIN)[MARGIN:-MARGIN]
    return torch.from_numpy(up).float().to(device), torch.from_numpy(down).float().to(device)


def lowpass(length: int) -> np.ndarray:
    """SYM6 and every other sample, as a matrix (length, 2 length): row i has tap CENTRE + o - 2i in column o."""
    tap = CENTRE + np.arange(2 * length) - 2 * np.arange(length)[:, None]
    inside = (tap >= 0) & (tap < len(SYM6))
    return np.where(inside, np.take(SYM6, tap, mode="clip"), 0.0)


@dataclass(frozen=True)
class Augmentation:
    """`flips`: half of the images are mirrored, and no label says so; `probability`, in [0, 1], of each of EDM's changes.

    EDM trains CIFAR-10 with probability 0.12 and 64-pixel faces with 0.15, both without `flips`: its x-flips have a label.
    """

    flips: bool = False
    probability: float = 0

    def __call__(self, images: Tensor, seed: int, stream: str, positions: Indices) -> tuple[Tensor, Tensor | None]:
        """Changed images and their labels, (n, 9), on one device; no labels at probability 0. Keyed by `positions` (n,)."""
        if self.flips:
            images = flipped(images, uniform(seed, f"{stream}/flips", positions)[:, 0] < 0.5, 3)
        if not self.probability:
            return images, None
        coins = uniform(seed, f"{stream}/augment", positions, 10)
        changes = drawn(self.probability, coins, normal(seed, f"{stream}/augment/sizes", positions, (4,)))
        return changed(images, changes), changes.labels().to(images.device)


UNCHANGED = Augmentation()  #: images as they are
