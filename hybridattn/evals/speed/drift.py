"""What times would have been, had the machine been as calm in every round.

Memory and the last cache belong to all of a processor's cores, and so to the neighbours on a shared machine. How long a
read takes there drifts over minutes, by a factor of two on a busy machine, and everything that is timed drifts along,
by less, but alike for all models: a median of a whole run cannot know it. And where a neighbour uses the same core for
a while, calls that seem undisturbed between two that were not are slow, too. So reads are timed before the calls of
every figure (`calm.Probe.reads`), and what these, and the share of the calls beside which the probe was disturbed,
explain of a round's times is taken out by a regression (analysis of covariance: Cochran, Biometrics 13, 1957).
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridattn.evals.speed.calm import READS
from hybridattn.evals.speed.statistics import RESAMPLES, ROUNDING, TOLERANCE

MACHINE = ("device", "dtype", "threads")
READ = 12e-9  # seconds of one read of memory: what times are corrected to
SHARE = 0.3  # of a round's calls disturbed: likewise
FEWEST = 10  # rounds from which a drift can be told
CALLS = 50  # that a round has beside its own, as many of them disturbed as in all rounds


def factors(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """By what the seconds of each cell are to be multiplied; 1 for cells without samples or of too few rounds.

    The level of a row in a round is the median of its reads there; the share is that of a round's calls that were
    disturbed (`_shares`). Of the times only undisturbed ones are looked at. For every kind of figure (prefill, decode,
    training) two coefficients are fitted, by least squares of logarithms, to the medians of all figures in all rounds,
    each figure about its own mean: time ~ level^b exp(c share), with b and c of at least 0. Times are brought to the
    level `READ` and the share `SHARE`, or as near to them as `_near` lets them; two runs that come that far are
    brought to the same state of the machine. The coefficients are fitted anew to rounds drawn with replacement, so that
    intervals know how uncertain they are.

    Args:
        cells: of any kinds and machines; a cell that was timed has ``seconds``, ``probe`` and ``memory``.

    Returns:
        (cells, 1 + `RESAMPLES`): what was found, then what resampled runs would have found (`statistics.summary`).
    """
    machines: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, cell in enumerate(cells):
        if "memory" in cell["figures"]:
            machines[tuple(cell["config"][name] for name in MACHINE)].append(index)
    found = np.ones((len(cells), 1 + RESAMPLES))
    for indices in machines.values():
        timed = [cells[index] for index in indices]
        if len({cell["config"]["round"] for cell in timed}) >= FEWEST:
            found[indices] = _factors(timed)
    return found


def _factors(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """Those of one machine."""
    found = np.ones((len(cells), 1 + RESAMPLES))
    levels, others = _levels(cells)
    if not levels:
        return found
    floor = min(x for cell in cells for x in cell["figures"]["probe"])
    shares = _shares(cells, floor)
    target = np.array([_near(np.log(READ), [*levels.values()]), _near(SHARE, [*shares.values()])])
    turns = {turn: index for index, turn in enumerate(sorted(shares))}
    states: list[np.ndarray] = []
    points: dict[str, dict[str, list[Sequence[float]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        turn, visit = cell["config"]["round"], _visit(cell)
        states.append(np.array([levels.get(visit, others[turn]), shares[turn]]))
        pairs = zip(cell["figures"]["seconds"], cell["figures"]["probe"], strict=True)
        seconds = [x for x, probe in pairs if probe <= TOLERANCE * floor]
        if seconds and visit in levels:
            point = turns[turn], *states[-1], np.log(np.median(seconds))
            points[cell["kind"]][_without(cell, "round")].append(point)
    drawn = np.random.default_rng(0).multinomial(len(turns), [1 / len(turns)] * len(turns), size=RESAMPLES)
    weights = np.vstack([np.ones(len(turns)), drawn])  # how often each round counts
    fitted = {
        kind: slopes([np.array(each) for each in figures.values()], weights)
        for kind, figures in points.items()
        if len({point[0] for each in figures.values() for point in each}) >= FEWEST
    }
    for index, (state, cell) in enumerate(zip(states, cells, strict=True)):
        if cell["kind"] in fitted:
            found[index] = np.exp(fitted[cell["kind"]] @ (target - state))
    return found


def _levels(cells: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[int, float]]:
    """The logarithm of the median read of each visit that has reads; of each round, for visits that have none."""
    of_visit: dict[str, list[float]] = defaultdict(list)
    of_round: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        of_visit[_visit(cell)] += cell["figures"]["memory"]
        of_round[cell["config"]["round"]] += cell["figures"]["memory"]
    levels = {visit: float(np.log(np.median(each) / READS)) for visit, each in of_visit.items() if each}
    middle = float(np.median([*levels.values()])) if levels else 0.0
    return levels, {turn: float(np.log(np.median(each) / READS)) if each else middle for turn, each in of_round.items()}


def _visit(cell: dict[str, Any]) -> str:
    """Of a row in a round, whatever is timed."""
    return _without(cell, "tokens", "batch", "graph")


def _shares(cells: Sequence[dict[str, Any]], floor: float) -> dict[int, float]:
    """Of every round the share of its calls that were disturbed, had it had all figures.

    Of long calls more are disturbed, and not all rounds have the same figures: so it is the share in all rounds, and by
    how much more of a figure's calls were disturbed in this round than are of that figure in all. What few calls tell
    is drawn towards the share in all rounds, as by `CALLS` more.
    """
    counts: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for cell in cells:
        disturbed = np.sum([x > TOLERANCE * floor for x in cell["figures"]["probe"]])
        calls = np.array([disturbed, len(cell["figures"]["probe"])])
        counts[cell["kind"] + _without(cell, "round")].append((cell["config"]["round"], calls))
    more: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for each in counts.values():
        disturbed, calls = np.sum([count for _, count in each], axis=0)
        for turn, (here, of) in each:
            more[turn] += here - of * disturbed / calls, of
    everywhere, calls = np.sum([count for each in counts.values() for _, count in each], axis=0)
    return {turn: float(everywhere / calls + extra / (of + CALLS)) for turn, (extra, of) in more.items()}


def _near(wanted: float, values: Sequence[float]) -> float:
    """What comes nearest to what is wanted, no farther from the middle eight tenths of the values than they are wide.

    A line is not drawn out to where a quiet machine, or one of another kind, never comes near.
    """
    low, high = np.quantile(values, [0.1, 0.9])
    return float(np.clip(wanted, 2 * low - high, 2 * high - low))


def _without(cell: dict[str, Any], *names: str) -> str:
    """A cell's configuration without some of its fields, as a key."""
    return json.dumps({name: value for name, value in cell["config"].items() if name not in names}, sort_keys=True)


def slopes(groups: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The slopes that points of several groups share, each group about its own means (least squares); at least 0.

    Args:
        groups: of each the points (round, x1, x2, .., y).
        weights: (runs, rounds): by how much each round counts in each run.

    Returns:
        (runs, number of x).
    """
    width = groups[0].shape[1] - 1
    products = np.zeros((len(weights), width, width))
    for group in groups:
        values, counts = group[:, 1:] - group[:, 1:].mean(axis=0), weights[:, group[:, 0].astype(int)]
        sums = counts @ values
        inner = np.einsum("rp,pi,pj->rij", counts, values, values)
        total = np.maximum(counts.sum(axis=1), 1)  # a run may have drawn none of a group's rounds
        about_means = inner - sums[:, :, None] * sums[:, None, :] / total[:, None, None]
        products += np.where(abs(about_means) > ROUNDING * abs(inner), about_means, 0)
    return np.array([_at_least_0(each[:-1, :-1], each[:-1, -1]) for each in products])


def _at_least_0(x_x: np.ndarray, x_y: np.ndarray) -> np.ndarray:
    """The least-squares solution without what comes out below 0."""
    found, used = np.zeros(len(x_y)), np.arange(len(x_y))
    while len(used):
        fit = np.linalg.lstsq(x_x[np.ix_(used, used)], x_y[used])[0]
        if min(fit) >= 0:
            found[used] = fit
            break
        used = np.delete(used, fit.argmin())
    return found
