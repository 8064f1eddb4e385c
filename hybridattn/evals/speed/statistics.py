"""What samples of a time say: median, spread, and how far another run's median may lie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.99  # of intervals: two runs have some hundred, which should all overlap if nothing changed
LEAST = 10  # samples, from which a 90th percentile can be read
ROUNDING = 1e-9  # of sums of weights
TOLERANCE = 1.05  # times the floor of `calm.Probe`


def median(rounds: Sequence[Sequence[float]]) -> float:
    """The median of samples of which a round's count as much together as another round's, however many they are.

    Of calm rounds more samples are left than of disturbed ones, which would make a run's median depend on that.
    """
    counts = np.array([len(each) for each in rounds if len(each)])
    return _weighted_median(np.concatenate([np.asarray(each) for each in rounds]), np.repeat(1 / counts, counts))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.mean(_at(values, weights, 0.5)))


def _at(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """The two values between which lies a share of the weights; twice the same unless that is the end of one."""
    order = values.argsort()
    below = weights[order].cumsum()
    wanted = share * below[-1]
    return values[order[below.searchsorted([wanted * (1 - ROUNDING), wanted * (1 + ROUNDING)])]]


def summary(rounds: Sequence[Sequence[float]], factors: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
    """Median and spread of samples that were taken in rounds, some time apart.

    The interval holds the median of 99 % of the resampled runs: rounds are drawn with replacement, then samples within
    each (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 8). So it is as wide as a machine that
    drifts between rounds makes it, if there are enough of them; of ten rounds or fewer it is too narrow, and of one
    round it only knows that round.

    Args:
        rounds: seconds, at least `LEAST` samples in all; a round may have none.
        factors: of every round by what its seconds are to be multiplied, and by what in each of the `RESAMPLES`
            resampled runs (`drift.factors`); 1 if None.

    Returns:
        ``median``, ``p10`` and ``p90`` (rounds count alike: `median`), ``low`` and ``high`` (the interval), all in
        seconds, and ``samples``.

    Raises:
        ValueError: fewer than `LEAST` samples.
    """
    by = np.ones((len(rounds), 1 + RESAMPLES)) if factors is None else np.array(factors)
    counts = np.array([len(each) for each in rounds])
    by, counts = by[counts > 0], counts[counts > 0]
    measured = np.concatenate([np.asarray(each, dtype=float) for each in rounds])
    if len(measured) < LEAST:
        raise ValueError(f"samples: expected at least {LEAST}, got {len(measured)}")
    first = counts.cumsum() - counts  # sample of each round
    generator = np.random.default_rng(0)
    medians = []
    for factor in by[:, 1:].T:
        drawn = generator.integers(len(counts), size=len(counts))
        each = np.repeat(drawn, counts[drawn])  # the round of every sample
        places = first[each] + generator.integers(counts[each])
        medians.append(_weighted_median(measured[places] * factor[each], 1 / counts[each]))
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    samples, weights = measured * np.repeat(by[:, 0], counts), np.repeat(1 / counts, counts)
    return {
        "median": _weighted_median(samples, weights),
        "p10": float(_at(samples, weights, 0.1)[1]),
        "p90": float(_at(samples, weights, 0.9)[1]),
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
        Of every round the samples that count, and the tolerance.
    """
    lowest = sorted(x / floor for _, probes in rounds for x in probes)
    calmest = sorted(min(probes) / floor for _, probes in rounds)
    tolerance = max(TOLERANCE, lowest[:LEAST][-1], calmest[(len(rounds) - 1) // 2])
    return [[x for x, probe in zip(*each, strict=True) if probe / floor <= tolerance] for each in rounds], tolerance


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The b of cost = a * size^b that fits best, least squares of logarithms; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit([math.log(x) for x in sizes], [math.log(y) for y in costs], 1)[0])
