"""The picture: recall against state size and against decode speed, with the Pareto fronts."""

from collections.abc import Sequence
from itertools import pairwise, product
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase


class Point(NamedTuple):
    """One model: recall of 32 pairs as a share, state in bytes per sequence, tokens per second decoded at batch 32."""

    label: str
    recall: float
    state_bytes: float
    decode_rate: float


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The Pareto front: indices of the points that no other one matches in both and beats in one, by rising cost.

    Args:
        costs: less is better.
        gains: more is better, one per cost.
    """
    best: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        is_tie = best and (costs[best[-1]], gains[best[-1]]) == (costs[i], gains[i])
        if not best or gains[i] > gains[best[-1]] or is_tie:
            best.append(i)
    return best


def fronts(points: Sequence[Point]) -> tuple[list[int], list[int]]:
    """The points that none beats: in recall and fewer state bytes, and in recall and more decoded tokens per second.

    Recall counts in steps of 0.001, what a test of a few thousand answers can tell apart.
    """
    recalls = [round(point.recall, 3) for point in points]
    states, rates = [point.state_bytes for point in points], [-point.decode_rate for point in points]
    return front(states, recalls), front(rates, recalls)


def draw(points: Sequence[Point], path: Path, *, title: str = "") -> None:
    """Draw two panels, recall against state bytes and against decode speed (both log), every point labelled.

    Args:
        points: the models, 1 to 10.
        path: the PNG file to write.
        title: a line over the picture.
    """
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    recalls = [point.recall for point in points]
    panels = (
        ("state, bytes per sequence (less is better)", [point.state_bytes for point in points]),
        ("decode, tokens/s at batch 32 (more is better)", [point.decode_rate for point in points]),
    )
    colors = [f"C{i}" for i in range(len(points))]
    for axes, (label, values), best in zip(figure.subplots(1, 2, sharey=True), panels, fronts(points), strict=True):
        axes.plot([values[i] for i in best], [recalls[i] for i in best], "--", color="tab:gray", zorder=1)
        axes.scatter(values, recalls, c=colors, s=45, zorder=2)
        axes.set(xscale="log", xlabel=label, xlim=(min(values) / 2, max(values) * 2), ylim=(-0.08, 1.15))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title("dashed: Pareto front", fontsize=9, color="tab:gray")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("recall, 32 pairs")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # labels are placed in the layout just computed
    for axes in figure.axes:
        place_labels(axes, [point.label for point in points], colors)
    figure.savefig(path)


def place_labels(axes: Axes, labels: Sequence[str], colors: Sequence[str]) -> list[Annotation]:
    """Label the points of a panel's scatter so that no label covers another one, a point or the panel's line.

    Each label takes the first free one of some places around its point, nearest first; the last one if none is free.
    """
    points = np.asarray(axes.collections[0].get_offsets())
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in axes.transData.transform(points)]
    corners = axes.transData.transform(axes.lines[0].get_xydata())
    for start, end in pairwise(corners):
        taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in np.linspace(start, end, 100)]
    notes = []
    for point, label, color in zip(points, labels, colors, strict=True):
        note = axes.annotate(label, point, xytext=(0, 0), textcoords="offset points", color=color, fontsize=9)
        note.set(ha="center", va="center")
        half = note.get_window_extent().width / axes.figure.dpi * 72 / 2
        for distance, turn in product((0, 10, 22, 34, 48, 64, 88), range(8)):
            across, up = cos(turn * pi / 4), sin(turn * pi / 4)
            note.set_position((across * (half + 8 + distance), up * (12 + distance)))
            box = note.get_window_extent()
            if holds(axes.bbox, box) and not any(box.overlaps(other) for other in taken):
                break
        taken.append(note.get_window_extent())
        notes.append(note)
    return notes


def holds(outer: BboxBase, inner: BboxBase) -> bool:
    """Whether one box lies inside another."""
    return all(outer.contains(*corner) for corner in inner.corners())
