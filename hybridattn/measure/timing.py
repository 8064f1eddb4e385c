"""Timing of calls in seconds, and medians, quartiles and ratios of the samples."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch


def timed(call: Callable[[], object]) -> float:
    """Measure the seconds of one call, including the work that it queues on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sample(call: Callable[[], object], *, least: int = 3, seconds: float = 0.2, most: int = 1000) -> list[float]:
    """Time single calls after a warm-up of two calls, or of one call if it takes over ten times ``seconds``.

    Args:
        call: function to be timed.
        least: least number of samples.
        seconds: the samples take at least this many seconds together, unless ``most`` is reached.
        most: largest number of samples.

    Returns:
        Seconds of every timed call.
    """
    if timed(call) < 10 * seconds:  # in a new process the second call may still be slow
        call()
    found: list[float] = []
    while len(found) < most and (len(found) < least or sum(found) < seconds):
        found.append(timed(call))
    return found


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return ``median``, ``low`` (minimum) and ``high`` (maximum) of the ratios of two times within a round.

    Args:
        numerator, denominator: seconds per round, of the same rounds, one or more.
    """
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def summary(rounds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return median and quartiles of all samples, and the median of each round.

    Args:
        rounds: seconds of one or more samples, by name of the round.

    Returns:
        ``median``, ``lower_quartile``, ``upper_quartile`` in seconds; ``samples``, the number of samples; ``rounds``,
        the median of each round in seconds, by name.
    """
    pooled = [x for each in rounds.values() for x in each]
    lower, upper = (pooled[0], pooled[0])
    if len(pooled) > 1:
        lower, _, upper = quantiles(pooled, n=4, method="inclusive")
    return {
        "median": median(pooled),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "samples": len(pooled),
        "rounds": {name: median(each) for name, each in rounds.items()},
    }
