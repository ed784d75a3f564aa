"""The verb `sample`: images from a trained flow, as a picture or an array."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from .. import api, parts
from ..artifacts import write_atomically
from ..data.sets import to_uint8
from ..errors import require
from ..networks.precision import InPrecision
from . import auto, guidance
from .sampler import require_suited


def sample(cfg: DictConfig) -> Path:
    """Draw `num_images` of `run` with inf's solver and grid at `nfe`, and write them to `out` (.png or .npz)."""
    flow = api.load(parts.require_run(cfg.run), cfg.profile)
    if cfg.t_max is None:
        cfg.t_max = flow.t_max
    parts.check(cfg)
    needs_result = "is for evaluate and study, which measure what they find and print it as words for this command"
    require(not auto.is_asked(cfg), "inf", "auto", needs_result)
    parts.require_whole("num_images", cfg.num_images, 1)
    out, label, device = target(cfg.out, flow.shape), classes(parts.plain(cfg.label), cfg.num_images), parts.device(cfg)
    require_suited(instantiate(cfg.inf.solver), flow.description, given := instantiate(cfg.inf.guidance))
    guided = guidance.check(given, flow.description, "inf.guidance")
    flow.velocity = guided.velocity(InPrecision(flow.velocity, cfg.precision), cfg.precision, device)
    how = {"solver": instantiate(cfg.inf.solver), "grid": instantiate(cfg.inf.grid), "nfe": cfg.nfe, "t_max": cfg.t_max}
    made = api.sample(flow.to(device), cfg.num_images, seed=cfg.seed, label=label, **how)
    require(bool(made.isfinite().all()), "run", cfg.run, "made NaN or infinite samples")
    made = flow.decode(made.to(device), cfg.autoencoder).cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda p: picture(to_uint8(made)).save(p, "png") if out.suffix == ".png" else save_array(made, p))
    led = f", guidance {guidance.in_words(guided.recipe)}" if guided.recipe else ""
    print(f"{cfg.num_images} samples{led}: {out}")
    return out


def classes(given: Any, num_images: int) -> Tensor | None:
    """What the key `label` says: a class for all images, or a list of one each; None leaves them to the flow."""
    listed = given if isinstance(given, list) else [given] * num_images
    whole = all(isinstance(y, int) and not isinstance(y, bool) for y in listed)
    require(given is None or whole, "label", given, "must be a class, a whole number, or a list of one for each image")
    return None if given is None else torch.tensor(listed, dtype=torch.int64)


def target(out: str | None, shape: tuple[int, ...]) -> Path:
    """The file to write samples of this shape to; raises a `UserError` before any is drawn."""
    path = Path(out or "")
    require(path.suffix in (".png", ".npz"), "out", out, "must end in .png (a grid) or .npz (an array)")
    require(path.suffix == ".npz" or len(shape) == 3, "out", out, "points are no picture: must end in .npz")
    return path


def picture(images: Tensor, columns: int | None = None) -> Image.Image:
    """A grid of images, uint8 (n, c, h, w), row by row."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    blank = torch.zeros(rows * columns - n, c, h, w, dtype=torch.uint8)
    tiles = torch.cat((images, blank)).reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return Image.fromarray(tiles.squeeze(-1).numpy())


def save_array(samples: Tensor, path: Path) -> None:
    """Images as uint8 (n, h, w, c), the field's layout, or points as floats, under the key `samples`."""
    array = to_uint8(samples).permute(0, 2, 3, 1) if samples.ndim == 4 else samples
    with path.open("wb") as file:
        np.savez(file, samples=array.numpy())
