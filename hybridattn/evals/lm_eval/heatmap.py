"""Draw heat maps of scores over two axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Panel(NamedTuple):
    """One heat map: names and values of its axes, and the scores ``[down, across]`` (NaN: no score)."""

    across: str
    down: str
    columns: Sequence[float]
    rows: Sequence[float]
    scores: np.ndarray


def draw(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Draw heat maps side by side, with every score as text in its cell; the colour scale is from 0 to 1.

    Args:
        panels: one or more heat maps.
        path: the PNG file to write.
        title: title above the heat maps.
    """
    width = sum(2 + 0.9 * len(panel.columns) for panel in panels)
    height = 2 + 0.5 * max(len(panel.rows) for panel in panels)
    figure = Figure(figsize=(max(width, 4), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(panel.scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(panel.columns)), [f"{value:,}" for value in panel.columns])
        axes.set_yticks(range(len(panel.rows)), [f"{value:,}" for value in panel.rows])
        axes.set(xlabel=panel.across, ylabel=panel.down)
        for (i, j), score in np.ndenumerate(panel.scores):
            if not np.isnan(score):
                color = "white" if score < 0.6 else "black"
                axes.text(j, i, f"{score:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path)
