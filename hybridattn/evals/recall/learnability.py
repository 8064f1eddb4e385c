"""Summarise the training runs of one configuration over seeds and learning rates: best rate, median and spread."""

from collections.abc import Sequence
from statistics import median
from typing import Any

THRESHOLD = 0.9  # recall from which a run counts as having learned the task


def learnability(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the runs of one configuration.

    Args:
        runs: dicts with ``rate``, ``seed``, ``recall`` (the final recall of one number of pairs) and ``curve``, pairs
            of (steps, recall).

    Returns:
        ``rate``, the learning rate with the best median recall. For the runs at this rate: ``median``, ``best`` and
        ``worst`` recall; ``runs``, their number; ``reached``, the number that reached the threshold;
        ``steps_to_threshold``, the median over the latter, or None; ``threshold``.
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
    """Return the steps at the first test of recall that reached the threshold, or None."""
    return next((steps for steps, recall in curve if recall >= THRESHOLD), None)
