"""Pictures of what `inspect` finds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..artifacts import write_atomically
from .per_class import ClassDistance
from .values import Z95

NAMED = 40  #: classes up to which each is named on its axis
GAP = 0.09  #: inches between images


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    made = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png",)) -> None:
    """Write NAME.png, and for plots NAME.svg, without the date."""
    for kind in kinds:
        metadata = {"Date": None} if kind == "svg" else None
        write_atomically(folder / f"{name}.{kind}", lambda p, k=kind, m=metadata: made.savefig(p, format=k, metadata=m))  # type: ignore[misc]


PLOT = ("png", "svg")


def show(axes: Any, image: Tensor) -> None:
    """One image, uint8 (c, h, w), without ticks."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def side(images: Sequence[Tensor]) -> float:
    """Inches that an image of these takes: two screen pixels a pixel at least, and not below what a label needs."""
    return max(0.75, min(2.0, images[0].shape[-1] / 75))


def tiles(
    folder: Path, name: str, rows: Mapping[str, Tensor], titles: Sequence[str], captions: Mapping[str, Sequence[str]]
) -> None:
    """A grid of images: rows[label], uint8 (columns, c, h, w); a title over each column, captions[label] under a row's images."""
    images, columns = list(rows.values()), len(titles)
    inch = side(images)
    made = figure((inch + GAP) * columns + 0.07 * max(map(len, rows)), (inch + GAP) * len(rows) + 0.17 * len(captions) + 0.3)
    for (i, j), axes in np.ndenumerate(made.subplots(len(rows), columns, squeeze=False)):
        label = list(rows)[i]
        show(axes, rows[label][j])
        if i == 0:
            axes.set_title(titles[j], fontsize=8)
        if j == 0:
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        if label in captions:
            axes.set_xlabel(captions[label][j], fontsize=7, labelpad=2)
    save(made, folder, name)


def along_time(folder: Path, t: Sequence[float], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """A panel for each curve over t: (mean, standard error) by bin, with its 95 % band."""
    made = figure(4.5 * len(curves), 3.2)
    for axes, (name, (mean, error)) in zip(made.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        middle, half = np.array(mean), Z95 * np.array(error)
        axes.plot(t, middle, color="C0", linewidth=1.5)
        axes.fill_between(t, middle - half, middle + half, color="C0", alpha=0.25, linewidth=0)
        axes.set(xlabel="t  (0 data, 1 noise)", title=name, xlim=(0, 1), ylim=(0, None))
        axes.grid(alpha=0.3)
    save(made, folder, "straightness", PLOT)


def histograms(folder: Path, spaces: Mapping[str, Mapping[str, Any]]) -> None:
    """Nearest distances of samples and of held-out images in each space, with the threshold where there is one."""
    made = figure(4.5 * len(spaces), 3.2)
    for axes, (name, found) in zip(made.subplots(1, len(spaces), squeeze=False)[0], spaces.items(), strict=True):
        sets = {label: found[label] for label in ("samples", "held-out images") if found[label] is not None}
        bins = np.histogram_bin_edges(np.concatenate(list(sets.values())), max(10, min(40, len(found["samples"]) // 5))).tolist()
        for label, values in sets.items():
            axes.hist(values, bins, density=True, histtype="stepfilled", alpha=0.45, label=label)
        if found["threshold"] is not None:
            axes.axvline(found["threshold"], color="black", linewidth=1, linestyle="--", label="nearest 1 % of held-out")
        axes.set(xlabel="distance to the nearest training image", title=name, yticks=[])
    axes.legend(fontsize=8)
    save(made, folder, "nearest", PLOT)


def by_class(folder: Path, found: Sequence[ClassDistance], name: str) -> None:
    """Each class's distance, the largest first, above its floor; classes without one are left out."""
    known = sorted(((c.distance, c.label, c.floor) for c in found if c.distance is not None), reverse=True)
    made = figure(min(12.0, max(4.5, 0.28 * len(known))), 3.2)
    axes, places = made.subplots(), range(len(known))
    axes.plot(places, [distance for distance, _, _ in known], "o", markersize=4, label="generated")
    floors = [(i, floor) for i, (_, _, floor) in enumerate(known) if floor is not None]
    if floors:
        axes.plot(*zip(*floors, strict=True), "_", color="black", label="other real images (floor)")
    axes.set(ylabel=f"{name} to real images", xlabel="class", ylim=(0, None))
    named = len(known) <= NAMED
    axes.set_xticks(places if named else [], [str(label) for _, label, _ in known] if named else [])
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    save(made, folder, "classes", PLOT)
