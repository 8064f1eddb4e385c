"""Compute Pareto fronts of recall against memory and speed, and place labels that do not overlap in their plot."""

from collections.abc import Sequence
from itertools import pairwise, product
from math import cos, pi, sin
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase


def points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of the fronts: one dict for every row that has recall, cache size and decoding speed.

    Returns:
        ``name``; ``recall`` at ``pairs``, the number of pairs with the largest spread between rows; ``state_bytes``
        after ``state_tokens``, the smallest measured number of tokens; ``step``, seconds of a decoding step of one
        sequence after ``context`` tokens, the shortest context; ``tokens_per_second`` for ``batch`` sequences, the
        largest batch after that context.
    """
    found, pairs = [], _most_spread(rows)
    for row in rows:
        steps = [each for each in row["decode"] if "median" in each and not each["graph"]]
        sizes = [(tokens, each) for tokens, each in row["state"].items() if "reason" not in each]
        if pairs is None or not (row["recall"] and steps and sizes):
            continue
        shortest = [each for each in steps if each["tokens"] == steps[0]["tokens"]]
        found.append(
            {
                "name": row["label"],
                "pairs": pairs,
                "recall": row["recall"][str(pairs)]["median"],
                "state_bytes": sizes[0][1]["allocated"],
                "state_tokens": int(sizes[0][0]),
                "step": shortest[0]["median"],
                "context": shortest[0]["tokens"],
                "batch": shortest[-1]["batch"],
                "tokens_per_second": shortest[-1]["batch"] / shortest[-1]["median"],
            }
        )
    return found


def _most_spread(rows: Sequence[dict[str, Any]]) -> int | None:
    """Return the number of pairs at which recall differs most between rows; None if rows have no number in common."""
    trained = [row for row in rows if row["recall"]]
    common = set[str]().union(*(row["recall"] for row in trained)).intersection(*(row["recall"] for row in trained))

    def spread(pairs: int) -> float:
        shares = [row["recall"][str(pairs)]["median"] for row in trained]
        return round(max(shares) - min(shares), 3)

    return max(map(int, common), key=lambda pairs: (spread(pairs), pairs), default=None)


def best_under(costs: Sequence[float], gains: Sequence[float], limits: Sequence[float]) -> list[int | None]:
    """Return for every limit the index of the largest gain at a cost within the limit, or None.

    Of equal gains, the cheapest is taken.
    """
    best: list[int | None] = []
    for limit in limits:
        within = [i for i, cost in enumerate(costs) if cost <= limit]
        best.append(max(within, key=lambda i: (round(gains[i], 3), -costs[i])) if within else None)
    return best


def limits(costs: Sequence[float]) -> list[float]:
    """Return round limits over the range of costs: 1, 2 and 5 times powers of ten."""
    steps = [m * 10.0**e for e in range(-9, 15) for m in (1, 2, 5)]
    low = max(i for i, step in enumerate(steps) if step <= min(costs))
    high = min(i for i, step in enumerate(steps) if step >= max(costs))
    return steps[low + 1 : high + 1] or steps[high : high + 1]


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Return the Pareto front, by rising cost: the indices of the points that no other point dominates.

    A point dominates another if it is at least as good in cost and gain, and better in one.

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
    """Label the points of a scatter plot so that no label overlaps another label, a point or the line.

    Each label takes the first free position around its point, nearest first, or the farthest if none is free.
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
