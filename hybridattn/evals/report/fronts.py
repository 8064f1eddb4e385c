"""Pareto fronts, and labels of points that do not cover each other."""

from collections.abc import Sequence
from itertools import pairwise, product
from math import cos, pi, sin

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase


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
