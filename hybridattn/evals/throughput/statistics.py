"""What samples of a time say: median, spread, and how far another run's median may lie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
LEAST = 10  # samples, from which a 90th percentile can be read
TOLERANCE = 1.05  # times the floor of `calm.Probe`


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median and spread of samples that were taken in rounds, some time apart.

    The interval holds the median of 95 % of the resampled runs: rounds are drawn with replacement, then samples within
    each (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 8). So it is as wide as a machine that
    drifts between rounds makes it, if there are enough of them: of ten rounds it holds about nine of ten medians, of
    few it is too narrow, and of one round it only knows that round.

    Args:
        rounds: seconds, at least `LEAST` samples in all.

    Returns:
        ``median``, ``p10`` and ``p90``, ``low`` and ``high`` (the interval), all in seconds, and ``samples``.

    Raises:
        ValueError: fewer than `LEAST` samples.
    """
    samples = np.concatenate([np.asarray(each, dtype=float) for each in rounds])
    if len(samples) < LEAST:
        raise ValueError(f"samples: expected at least {LEAST}, got {len(samples)}")
    generator = np.random.default_rng(0)
    medians = []
    for _ in range(RESAMPLES):
        drawn = [rounds[i] for i in generator.integers(len(rounds), size=len(rounds))]
        medians.append(np.median(np.concatenate([generator.choice(each, len(each)) for each in drawn])))
    low, high = np.quantile(medians, [0.025, 0.975])
    p10, p90 = np.quantile(samples, [0.1, 0.9], method="higher")
    return {
        "median": float(np.median(samples)),
        "p10": float(p10),
        "p90": float(p90),
        "low": float(low),
        "high": float(high),
        "samples": len(samples),
    }


def undisturbed(
    rounds: Sequence[tuple[Sequence[float], Sequence[float]]], floor: float
) -> tuple[list[list[float]], float]:
    """The samples that count: those beside which `calm.Probe` took at most `TOLERANCE` times its floor.

    Where these are fewer than `LEAST`, or from fewer than half of the rounds, the tolerance is the lowest that gives as
    many.

    Args:
        rounds: of each the samples, and the seconds of the probe beside each of them.
        floor: the least seconds that the probe takes.

    Returns:
        Of every round that has any the samples that count, and the tolerance.
    """
    lowest = sorted(x / floor for _, probes in rounds for x in probes)
    calmest = sorted(min(probes) / floor for _, probes in rounds)
    tolerance = max(TOLERANCE, lowest[:LEAST][-1], calmest[(len(rounds) - 1) // 2])
    kept = [[x for x, probe in zip(*each, strict=True) if probe / floor <= tolerance] for each in rounds]
    return [each for each in kept if each], tolerance


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The b of cost = a * size^b that fits best, least squares of logarithms; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit([math.log(x) for x in sizes], [math.log(y) for y in costs], 1)[0])
