"""What times would have been, had memory been as fast in every round.

Memory and the last cache belong to all of a processor's cores, and so to the neighbours on a shared machine. How long a
read takes there drifts over minutes, by a factor of two on a busy machine, and everything that is timed drifts along,
by less, but alike for all models: a median of a whole run cannot know it. So reads are timed before the calls of every
figure (`calm.Probe.reads`), and what a round's reads explain of its times is taken out by a regression (analysis of
covariance: Cochran, Biometrics 13, 1957).
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
FEWEST = 10  # rounds from which a drift can be told


def factors(cells: Sequence[dict[str, Any]]) -> list[float]:
    """By what the seconds of each cell are to be multiplied; 1 for cells without samples or of too few rounds.

    The level of a row in a round is the median of its reads there over the fastest reads of the machine. Only
    undisturbed samples are looked at. For every kind of figure (prefill, decode, training) one exponent is fitted, by
    least squares of logarithms, to the medians of all figures in all rounds, each figure about its own mean:
    time ~ level^b, with b of at least 0. Times are brought to the level `REFERENCE`, or as near to it as the middle
    eight tenths of the levels come. Intervals made of them take b as known.

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
    seconds: list[list[float]] = []
    for visit, cell in zip(visits, cells, strict=True):
        pairs = zip(cell["figures"]["seconds"], cell["figures"]["probe"], strict=True)
        seconds.append([x for x, probe in pairs if probe <= TOLERANCE * floor])
        reads[visit] += cell["figures"]["memory"]
    fastest = min((x for each in reads.values() for x in each), default=1.0)
    levels = {visit: math.log(float(np.median(each)) / fastest) for visit, each in reads.items() if each}
    if not levels:
        return [1.0] * len(cells)
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for visit, cell, times in zip(visits, cells, seconds, strict=True):
        if times and visit in levels:
            points[cell["kind"]][_without(cell, "round")].append((levels[visit], math.log(float(np.median(times)))))
    exponents = {kind: slope(list(figures.values())) for kind, figures in points.items()}
    target = float(np.clip(math.log(REFERENCE), *np.quantile(list(levels.values()), [0.1, 0.9])))
    return [
        math.exp(exponents.get(cell["kind"], 0.0) * (target - levels.get(visit, target)))
        for visit, cell in zip(visits, cells, strict=True)
    ]


def _without(cell: dict[str, Any], *names: str) -> str:
    """A cell's configuration without some of its fields, as a key."""
    return json.dumps({name: value for name, value in cell["config"].items() if name not in names}, sort_keys=True)


def slope(groups: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The slope that (x, y) of several groups share, each about its own mean (least squares); at least 0."""
    centred = [np.asarray(each) - np.mean(each, axis=0) for each in groups]
    x, y = np.concatenate(centred).T if centred else (np.zeros(0), np.zeros(0))
    return max(0.0, float(x @ y / (x @ x))) if x @ x > 0 else 0.0
