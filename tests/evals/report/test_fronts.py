from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridattn.evals.report.fronts import best_under, front, holds, limits, place_labels

LABELS = ["softmax attention", "sliding window 16", "linear attention", "GLA", "attention-first hybrid"]


def dominated(i: int, costs: list[float], gains: list[float]) -> bool:
    """Whether another point is at least as good in both and better in one."""
    return any(
        costs[j] <= costs[i] and gains[j] >= gains[i] and (costs[j], gains[j]) != (costs[i], gains[i])
        for j in range(len(costs))
    )


@pytest.mark.parametrize("case", range(50))
def test_no_point_dominates_the_front(case: int):
    generator = torch.Generator().manual_seed(case)
    count = case % 12 + 1
    costs, gains = torch.randint(6, (2, count), generator=generator).tolist()  # few values: ties and equal points
    found = front(costs, gains)
    assert sorted(found) == [i for i in range(count) if not dominated(i, costs, gains)]
    assert [costs[i] for i in found] == sorted(costs[i] for i in found)


@pytest.mark.parametrize("case", range(6))
def test_labels_cover_neither_each_other_nor_points(case: int):
    generator = torch.Generator().manual_seed(case)
    spread = (0.01, 0.05, 0.3)[case % 3]
    figure = Figure(figsize=(5.5, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = (0.5 + spread * torch.randn(2, 5, generator=generator)).clamp(0, 1).numpy()
    axes.plot(x[:2], y[:2])
    axes.scatter(x, y)
    axes.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    figure.canvas.draw()
    boxes = [note.get_window_extent() for note in place_labels(axes, LABELS, ["k"] * 5)]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(
        box.contains(*mark) for box in boxes for mark in axes.transData.transform(list(zip(x, y, strict=True)))
    )
    assert all(holds(axes.bbox, box) for box in boxes)


def test_the_best_within_a_budget():
    costs, gains = [10, 20, 40, 5], [0.5, 0.9, 0.90004, 0.4]
    assert best_under(costs, gains, [1, 5, 10, 30, 100]) == [None, 3, 0, 1, 1]


def test_budgets_are_round_and_cover_the_costs():
    assert limits([8704, 49672]) == [10e3, 20e3, 50e3]
    assert limits([0.0004, 0.0011]) == pytest.approx([0.0005, 0.001, 0.002])
    assert limits([3.0]) == [5]
    assert limits([5.0]) == [5]
