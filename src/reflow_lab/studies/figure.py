"""The picture of a study: its rows side by side on the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifacts import write_atomically
from .results import of

if TYPE_CHECKING:
    from .description import Study

NUM_COLUMNS = 8  #: images a row and number of steps


def draw_samples(path: Path, study: Study, cells: Sequence[dict[str, Any]]) -> None:
    """One strip of samples for each row and number of steps; column j of every strip starts from the same noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = (len(study.rows), len(study.nfe))
    figure = Figure(figsize=(4.2 * shape[1], 0.62 * shape[0] + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for (i, j), axes in np.ndenumerate(figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)):
        samples = np.load(Path(of(cells, study.rows[i].name, study.nfe[j])[0]["folder"]) / "samples.npy", allow_pickle=False)
        draw(axes, samples)
        axes.set(xticks=[], yticks=[])
        if i == 0:
            axes.set_title(f"{study.nfe[j]} NFE", fontsize=10)
        if j == 0:
            axes.set_ylabel(study.rows[i].name, rotation=0, ha="right", va="center", fontsize=10)
    write_atomically(path, lambda p: figure.savefig(p, format="png"))


def draw(axes: Any, samples: np.ndarray) -> None:
    """A strip of images, uint8 (n, c, h, w), or a scatter of the first and last coordinates of points (n, dim)."""
    if samples.ndim == 2:
        axes.scatter(samples[:, 0], samples[:, -1], s=2, linewidths=0)
        return
    strip = np.concatenate(list(samples[:NUM_COLUMNS].transpose(0, 2, 3, 1)), axis=1)
    axes.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
