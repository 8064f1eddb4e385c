"""How reliably a mix learns to recall: seeds and learning rates of one configuration, never the best run alone."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from hybridattn.evals.recall import mqar
from hybridattn.evals.recall.parallel import Job, train_all

THRESHOLD = 0.9  # of the recall that counts as learnt
EVERY = 25  # steps between two looks


def learnability(
    options: dict[str, Any],
    *,
    steps: int,
    seeds: int = 3,
    rates: Sequence[float] = (3e-3, 1e-2, 3e-2),
    pairs: int = max(mqar.TEST_PAIRS),
) -> dict[str, Any]:
    """Train a configuration on MQAR from every seed at every rate.

    Args:
        options: of ``HybridAttnConfig``.
        steps: optimiser steps of each run.
        seeds: runs per rate.
        rates: peak learning rates.
        pairs: N of the rows that recall is of.

    Returns:
        JSON values: ``runs`` (``rate``, ``seed``, ``recall`` at the end, ``steps_to_threshold`` or None), the best rate
        by its median (``rate``), and of the runs at that rate ``median``, ``best``, ``worst`` and
        ``steps_to_threshold`` (the median of those that got there, or None); ``threshold`` and ``pairs``.
    """
    jobs = [Job(options, steps, seed, rate, (pairs, EVERY)) for rate in rates for seed in range(seeds)]
    runs = []
    for job, weights in zip(jobs, train_all(jobs), strict=True):
        curve = weights["recall"].tolist()
        reached = [EVERY * (i + 1) for i, recall in enumerate(curve) if recall >= THRESHOLD]
        runs.append(
            {
                "rate": job.rate,
                "seed": job.seed,
                "recall": curve[-1],
                "steps_to_threshold": min(reached[0], steps) if reached else None,
            }
        )
    by_rate = {rate: [run for run in runs if run["rate"] == rate] for rate in rates}
    rate = max(rates, key=lambda r: median(run["recall"] for run in by_rate[r]))
    recalls = [run["recall"] for run in by_rate[rate]]
    reached = [run["steps_to_threshold"] for run in by_rate[rate] if run["steps_to_threshold"] is not None]
    return {
        "runs": runs,
        "rate": rate,
        "median": median(recalls),
        "best": max(recalls),
        "worst": min(recalls),
        "steps_to_threshold": median(reached) if reached else None,
        "threshold": THRESHOLD,
        "pairs": pairs,
    }
