"""How reliably a mix learns to recall: seeds and learning rates of one configuration, never the best run alone."""

from collections.abc import Sequence
from statistics import median
from typing import Any

THRESHOLD = 0.9  # of the recall that counts as learnt


def learnability(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of a configuration say together.

    Args:
        runs: each with ``rate``, ``seed``, ``recall`` at the end, of one number of pairs, and ``curve``, (steps,
            recall) on the way.

    Returns:
        The best rate by its median (``rate``), and of the runs at that rate ``median``, ``best``, ``worst``,
        ``steps_to_threshold`` (the median of those that got there, or None), ``reached`` and ``runs``, the numbers of
        those and of all; ``threshold``.
    """
    rates = sorted({run["rate"] for run in runs})
    by_rate = {rate: [run for run in runs if run["rate"] == rate] for rate in rates}
    rate = max(rates, key=lambda r: median(run["recall"] for run in by_rate[r]))
    recalls = [run["recall"] for run in by_rate[rate]]
    reached = [steps for run in by_rate[rate] if (steps := steps_to_threshold(run["curve"])) is not None]
    return {
        "rate": rate,
        "median": median(recalls),
        "best": max(recalls),
        "worst": min(recalls),
        "steps_to_threshold": median(reached) if reached else None,
        "reached": len(reached),
        "runs": len(recalls),
        "threshold": THRESHOLD,
    }


def steps_to_threshold(curve: Sequence[tuple[int, float]]) -> int | None:
    """The steps after which recall was first seen at the threshold."""
    return next((steps for steps, recall in curve if recall >= THRESHOLD), None)
