"""From cells to rows: one configuration, one row, with what was recalled, kept and timed, all of it the same model."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hybridattn.evals.recall.learnability import learnability
from hybridattn.evals.speed import drift
from hybridattn.evals.speed.statistics import LEAST, exponent, median, summary, undisturbed
from hybridattn.measure.provenance import json_sha256

BASE = ("name", "model", "train", "device", "dtype", "threads")  # of every cell's configuration: what a row is


def rows(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group cells by what they are of, in the order of the first ones.

    Returns:
        JSON values, one dict per row: ``label``, its name, and in brackets what tells it from others of that name;
        ``config`` and ``config_sha256``; ``facts`` (parameters, kernels, ..); ``recall``
        by number of pairs (median, lowest and highest of the seeds at the best rate) with ``learnability`` and
        ``curves``; ``state`` by tokens; ``prefill`` and ``training`` by tokens, ``decode`` as a list, each with a
        `summary` of the seconds that count, corrected for slow rounds (`drift.factors`), the ``measured`` median
        without that, how many were ``set_aside`` and at which ``tolerance`` of disturbance, and ``peak_bytes``;
        ``prefill_exponent``; ``decode_growth``, the ratio of the step after the longest context to that after the
        shortest, one sequence; ``largest_batch``. What was not measured is empty or None.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    cells = [{**cell, "factors": factors} for cell, factors in zip(cells, drift.factors(cells), strict=True)]
    for cell in sorted(cells, key=lambda cell: cell["kind"] != "model"):  # models are measured in the suite's order
        groups[json_sha256({name: cell["config"][name] for name in BASE})].append(cell)
    made = [_row(key, group) for key, group in groups.items()]
    return [{"label": _label(row, made), **row} for row in made]


def _label(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    config = row["config"]
    alike = [each["config"] for each in rows if each["config"]["name"] == config["name"]]
    differ = [name for name in BASE if any(each[name] != config[name] for each in alike)]
    told = [f"{config[name]} threads" if name == "threads" else config[name] for name in BASE[3:] if name in differ]
    told += [row["config_sha256"][:8]] if {"model", "train"} & set(differ) else []
    return f"{config['name']} ({', '.join(told)})" if told else config["name"]


def _row(key: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        kinds[cell["kind"]].append(cell)
    floor = min((x for cell in cells for x in cell["figures"].get("probe", ())), default=1.0)
    prefill, decode = _timed(kinds["prefill"], floor), _timed(kinds["decode"], floor)
    measured = [each for each in prefill if "median" in each]
    alone = [each for each in decode if each["batch"] == 1 and not each["graph"] and "median" in each]
    facts, largest = kinds["model"], kinds["largest_batch"]
    return {
        "config": {name: cells[0]["config"][name] for name in BASE},
        "config_sha256": key,
        "facts": facts[-1]["figures"] if facts else None,
        **_recall(kinds["recall"]),
        "state": {str(cell["config"]["tokens"]): cell["figures"] for cell in _by_tokens(kinds["state"])},
        "prefill": prefill,
        "prefill_exponent": exponent([x["tokens"] for x in measured], [x["median"] for x in measured]),
        "decode": decode,
        "decode_growth": alone[-1]["median"] / alone[0]["median"] if len(alone) > 1 else None,
        "training": _timed(kinds["training"], floor),
        "largest_batch": {**largest[-1]["config"], **largest[-1]["figures"]} if largest else None,
    }


def _by_tokens(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(cells, key=lambda cell: cell["config"]["tokens"])


def _timed(cells: Sequence[dict[str, Any]], floor: float) -> list[dict[str, Any]]:
    """Timed cells without their rounds, which are pooled; by tokens, batch and graph."""
    groups: dict[tuple[int, int, bool], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        config = cell["config"]
        groups[config["tokens"], config["batch"], config.get("graph", False)].append(cell)
    found = []
    for (tokens, batch, graph), group in sorted(groups.items()):
        here, rounds = {"tokens": tokens, "batch": batch, "graph": graph}, [cell["figures"] for cell in group]
        reasons = [each["reason"] for each in rounds if "reason" in each]
        samples = [(each["seconds"], each["probe"]) for each in rounds if "seconds" in each]
        count = sum(len(seconds) for seconds, _ in samples)
        if count < LEAST:  # a run that was cut off has too few yet
            found.append({**here, "reason": reasons[0] if reasons else f"{count} samples so far"})
            continue
        factors = [cell["factors"] for cell in group if "seconds" in cell["figures"]]
        kept, tolerance = undisturbed(samples, floor)
        figures = {**summary(kept, factors), "measured": median(kept)}
        peaks = [each["peak_bytes"] for each in rounds if each.get("peak_bytes") is not None]
        noise = {"set_aside": count - figures["samples"], "tolerance": tolerance}
        found.append({**here, **figures, **noise, "peak_bytes": peaks[0] if peaks else None})
    return found


def _recall(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall at the rate that is best by its median; of runs looked at with different steps between, the newest."""
    if not cells:
        return {"recall": {}, "learnability": None, "curves": []}
    cells = [cell for cell in cells if cell["config"].get("looks") == cells[-1]["config"].get("looks")]
    runs = [
        {
            "rate": cell["config"]["rate"],
            "seed": cell["config"]["seed"],
            "recall": cell["figures"]["curve"][-1][1],
            "curve": cell["figures"]["curve"],
            "shares": cell["figures"]["recall"],
        }
        for cell in cells
    ]
    learnt = learnability(runs)
    best = [run for run in runs if run["rate"] == learnt["rate"]]
    recall = {}
    for pairs in best[0]["shares"]:
        shares = sorted(run["shares"][pairs] for run in best)
        middle = (shares[(len(shares) - 1) // 2] + shares[len(shares) // 2]) / 2
        recall[pairs] = {"median": middle, "low": shares[0], "high": shares[-1], "seeds": len(shares)}
    return {"recall": recall, "learnability": learnt, "curves": [run["curve"] for run in best]}


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be: a cache that is not what its formula says, and one declared constant that grows."""
    told = []
    for row in rows:
        name = row["label"]
        for tokens, sizes in row["state"].items():
            if "reason" not in sizes and sizes["formula"] not in (None, sizes["allocated"]):
                told.append(
                    f"{name}: the cache after {int(tokens):,} tokens has {sizes['allocated']:,} bytes, by its formula "
                    f"{sizes['formula']:,}"
                )
        reach = (row["facts"] or {}).get("reach")
        kept = {
            sizes["allocated"]
            for tokens, sizes in row["state"].items()
            if reach is not None and int(tokens) >= reach and "reason" not in sizes
        }
        if len(kept) > 1:
            told.append(f"{name}: the cache is declared constant and has {' and '.join(map(str, sorted(kept)))} bytes")
    return told


def points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the fronts are made of, one dict for every row that has it all.

    Returns:
        ``name``; ``recall`` of ``pairs`` pairs, the most telling number that all rows have; ``state_bytes`` after
        ``state_tokens``, the fewest that were measured; ``step``, seconds of one sequence after ``context`` tokens, the
        shortest; ``tokens_per_second`` of ``batch`` sequences, the most that were decoded there.
    """
    found, pairs = [], _telling(rows)
    for row in rows:
        steps = [each for each in row["decode"] if "median" in each and not each["graph"]]
        sizes = [(tokens, each) for tokens, each in row["state"].items() if "reason" not in each]
        if pairs is None or not (row["recall"] and steps and sizes):
            continue
        shortest = [each for each in steps if each["tokens"] == steps[0]["tokens"]]
        found.append(
            {
                "name": row["label"],
                "pairs": pairs,
                "recall": row["recall"][str(pairs)]["median"],
                "state_bytes": sizes[0][1]["allocated"],
                "state_tokens": int(sizes[0][0]),
                "step": shortest[0]["median"],
                "context": shortest[0]["tokens"],
                "batch": shortest[-1]["batch"],
                "tokens_per_second": shortest[-1]["batch"] / shortest[-1]["median"],
            }
        )
    return found


def _telling(rows: Sequence[dict[str, Any]]) -> int | None:
    """The number of pairs whose recalls differ most, the larger of two; None if there is none that all rows have."""
    trained = [row for row in rows if row["recall"]]
    common = set[str]().union(*(row["recall"] for row in trained)).intersection(*(row["recall"] for row in trained))

    def spread(pairs: int) -> float:
        shares = [row["recall"][str(pairs)]["median"] for row in trained]
        return round(max(shares) - min(shares), 3)

    return max(map(int, common), key=lambda pairs: (spread(pairs), pairs), default=None)


def best_under(costs: Sequence[float], gains: Sequence[float], limits: Sequence[float]) -> list[int | None]:
    """For every limit the index of the largest gain whose cost is within it, of equal ones the cheapest, or None."""
    best: list[int | None] = []
    for limit in limits:
        within = [i for i, cost in enumerate(costs) if cost <= limit]
        best.append(max(within, key=lambda i: (round(gains[i], 3), -costs[i])) if within else None)
    return best


def limits(costs: Sequence[float]) -> list[float]:
    """Round limits over the range of some costs: 1, 2 and 5 times powers of ten."""
    steps = [m * 10.0**e for e in range(-9, 15) for m in (1, 2, 5)]
    low = max(i for i, step in enumerate(steps) if step <= min(costs))
    high = min(i for i, step in enumerate(steps) if step >= max(costs))
    return steps[low + 1 : high + 1] or steps[high : high + 1]
