"""What times would have been, had the machine been as calm in every round.

Memory and the last cache belong to all of a processor's cores, and so to the neighbours on a shared machine. How long a
read takes there drifts over minutes, by a factor of two on a busy machine, and everything that is timed drifts along,
by less, but alike for all models: a median of a whole run cannot know it. And where a neighbour uses the same core for
a while, calls that seem undisturbed between two that were not are slow, too. So reads are timed before the calls of
every figure (`calm.Probe.reads`), and what these, and the share of the calls beside which the probe was disturbed,
explain of a round's times is taken out by a regression (analysis of covariance: Cochran, Biometrics 13, 1957).
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridattn.evals.throughput.statistics import TOLERANCE

MACHINE = ("device", "dtype", "threads")
REFERENCE = 1.2  # times the fastest reads: what times are corrected to
SHARE = 0.15  # of the calls disturbed: likewise
FEWEST = 10  # rounds from which a drift can be told


def factors(cells: Sequence[dict[str, Any]]) -> list[float]:
    """By what the seconds of each cell are to be multiplied; 1 for cells without samples or of too few rounds.

    The level of a row in a round is the median of its reads there over the fastest reads of the machine; the share is
    that of a figure's calls in the round that were disturbed. Of the times only undisturbed ones are looked at. For
    every kind of figure (prefill, decode, training) two coefficients are fitted, by least squares of logarithms, to the
    medians of all figures in all rounds, each figure about its own mean: time ~ level^b exp(c share), with b and c of
    at least 0. Times are brought to the level `REFERENCE` and the share `SHARE`, or as near to them as the middle eight
    tenths of the levels and shares come. Intervals made of them take b and c as known.

    Args:
        cells: of any kinds and machines; a cell that was timed has ``seconds``, ``probe`` and ``memory``.
    """
    machines: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, cell in enumerate(cells):
        if "memory" in cell["figures"]:
            machines[tuple(cell["config"][name] for name in MACHINE)].append(index)
    found = [1.0] * len(cells)
    for indices in machines.values():
        timed = [cells[index] for index in indices]
        if len({cell["config"]["round"] for cell in timed}) >= FEWEST:
            for index, factor in zip(indices, _factors(timed), strict=True):
                found[index] = factor
    return found


def _factors(cells: Sequence[dict[str, Any]]) -> list[float]:
    """Those of one machine."""
    floor = min(x for cell in cells for x in cell["figures"]["probe"])
    visits = [_without(cell, "tokens", "batch", "graph") for cell in cells]  # of a row in a round
    reads: dict[str, list[float]] = defaultdict(list)
    for visit, cell in zip(visits, cells, strict=True):
        reads[visit] += cell["figures"]["memory"]
    fastest = min((x for each in reads.values() for x in each), default=1.0)
    levels = {visit: math.log(float(np.median(each)) / fastest) for visit, each in reads.items() if each}
    if not levels:
        return [1.0] * len(cells)
    shares = [float(np.mean([x > TOLERANCE * floor for x in cell["figures"]["probe"]])) for cell in cells]
    target = np.array([_near(math.log(REFERENCE), [*levels.values()]), _near(SHARE, shares)])
    states = [np.array([levels.get(visit, target[0]), share]) for visit, share in zip(visits, shares, strict=True)]
    points: dict[str, dict[str, list[Sequence[float]]]] = defaultdict(lambda: defaultdict(list))
    for visit, state, cell in zip(visits, states, cells, strict=True):
        pairs = zip(cell["figures"]["seconds"], cell["figures"]["probe"], strict=True)
        seconds = [x for x, probe in pairs if probe <= TOLERANCE * floor]
        if seconds and visit in levels:
            points[cell["kind"]][_without(cell, "round")].append((*state, math.log(float(np.median(seconds)))))
    fitted = {kind: slopes(list(figures.values())) for kind, figures in points.items()}
    return [
        math.exp(fitted.get(cell["kind"], np.zeros(2)) @ (target - state))
        for state, cell in zip(states, cells, strict=True)
    ]


def _near(wanted: float, values: Sequence[float]) -> float:
    """What comes nearest to what is wanted within the middle eight tenths of the values."""
    return float(np.clip(wanted, *np.quantile(values, [0.1, 0.9])))


def _without(cell: dict[str, Any], *names: str) -> str:
    """A cell's configuration without some of its fields, as a key."""
    return json.dumps({name: value for name, value in cell["config"].items() if name not in names}, sort_keys=True)


def slopes(groups: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """The slopes that (x1, x2, .., y) of several groups share, each about its own means (least squares); at least 0."""
    x_y = np.concatenate([np.asarray(each) - np.mean(each, axis=0) for each in groups])
    x, y = x_y[:, :-1], x_y[:, -1]
    found, used = np.zeros(x.shape[1]), np.arange(x.shape[1])
    while len(used):
        fit = np.linalg.lstsq(x[:, used], y)[0]
        if min(fit) >= 0:
            found[used] = fit
            break
        used = np.delete(used, fit.argmin())
    return found
