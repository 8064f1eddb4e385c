"""Group a report's measurements into rows: one row per configuration, with recall, memory and speed of the same model.

Times are medians and quartiles of the raw samples. A row is compared with its baseline, the first model of its suite,
within a round, in which one run timed both. A drift of the machine's speed then affects both alike.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from hybridattn.evals.recall.learnability import learnability
from hybridattn.measure.provenance import json_sha256
from hybridattn.measure.timing import ratio, summary

BASE = ("name", "model", "train", "device", "dtype", "threads")  # the configuration fields that identify a row
TIMED = ("prefill", "decode", "training")

Row = dict[str, Any]
Timed = dict[str, Any]


def rows(measurements: Sequence[dict[str, Any]]) -> list[Row]:
    """Group measurements by configuration, in the order in which models were first measured.

    Returns:
        JSON values, one dict per row. Fields that were not measured are empty or None:

        - ``label``: the row's name, followed in brackets by the fields in which rows of this name differ.
        - ``baseline``: label of the row that speeds are compared with, or None.
        - ``config``, ``config_sha256``, and ``facts``: properties of the model (parameters, kernels, ..).
        - ``recall``: by number of pairs, median, lowest and highest over the seeds at the best rate; with
          ``learnability`` and ``curves``.
        - ``state``: cache sizes by number of tokens.
        - ``prefill``, ``decode``, ``training``: lists by tokens and batch, each with the `summary` of its seconds,
          ``peak_bytes`` and ``speedup`` (see `_speedup`; None for the baseline itself).
        - ``prefill_exponent``; ``decode_growth``: ratio of the decoding times after the longest and after the shortest
          context, for one sequence; ``largest_batch``.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in sorted(measurements, key=lambda each: each["kind"] != "model"):  # "model" ones are in the suite's order
        if "name" in each["config"]:
            groups[row_key(each["config"])].append(each)
    made = {key: _row(key, group) for key, group in groups.items()}
    labels = {key: _label(row, [*made.values()]) for key, row in made.items()}
    baselines = {key: _baseline(group) for key, group in groups.items()}
    for key, row in made.items():
        for kind in TIMED:
            others = made[baselines[key]][kind] if baselines[key] in made else []
            for timed in (each for each in row[kind] if "median" in each):
                timed["speedup"] = None if baselines[key] == key else _speedup(timed, others)
    return [{"label": labels[key], "baseline": labels.get(baselines[key]), **row} for key, row in made.items()]


def row_key(config: dict[str, Any]) -> str:
    """Return the hash that identifies the row of a measurement's configuration."""
    return json_sha256({name: config[name] for name in BASE})


def _baseline(measurements: Sequence[dict[str, Any]]) -> str:
    """Return the key of the baseline row that the newest timing of a row names, or an empty string."""
    return next((each["figures"]["baseline"] for each in reversed(measurements) if "baseline" in each["figures"]), "")


def _speedup(timed: Timed, baselines: Sequence[Timed]) -> dict[str, float] | None:
    """Compute the speed relative to the baseline: ``median``, ``low`` and ``high`` of the ratios of rounds' medians.

    None if no round has both.
    """
    base = next((each for each in baselines if _setting(each) == _setting(timed)), {}).get("rounds", {})
    both = [turn for turn in timed["rounds"] if turn in base]
    return ratio([base[turn] for turn in both], [timed["rounds"][turn] for turn in both]) if both else None


def _setting(timed: Timed) -> tuple[int, int, bool]:
    return timed["tokens"], timed["batch"], timed["graph"]


def _label(row: Row, rows: Sequence[Row]) -> str:
    config = row["config"]
    alike = [each["config"] for each in rows if each["config"]["name"] == config["name"]]
    differ = [name for name in BASE if any(each[name] != config[name] for each in alike)]
    parts = [f"{config[name]} threads" if name == "threads" else config[name] for name in BASE[3:] if name in differ]
    parts += [row["config_sha256"][:8]] if {"model", "train"} & set(differ) else []
    return f"{config['name']} ({', '.join(parts)})" if parts else config["name"]


def _row(key: str, measurements: Sequence[dict[str, Any]]) -> Row:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in measurements:
        kinds[each["kind"]].append(each)
    prefill, decode, training = (_timed(kinds[kind]) for kind in TIMED)
    measured = [each for each in prefill if "median" in each]
    alone = [each for each in decode if each["batch"] == 1 and not each["graph"] and "median" in each]
    facts, largest = kinds["model"], kinds["largest_batch"]
    states = sorted(kinds["state"], key=lambda each: each["config"]["tokens"])
    return {
        "config": {name: measurements[0]["config"][name] for name in BASE},
        "config_sha256": key,
        "facts": facts[-1]["figures"] if facts else None,
        **_recall(kinds["recall"]),
        "state": {str(each["config"]["tokens"]): each["figures"] for each in states},
        "prefill": prefill,
        "prefill_exponent": exponent([x["tokens"] for x in measured], [x["median"] for x in measured]),
        "decode": decode,
        "decode_growth": alone[-1]["median"] / alone[0]["median"] if len(alone) > 1 else None,
        "training": training,
        "largest_batch": {**largest[-1]["config"], **largest[-1]["figures"]} if largest else None,
    }


def _timed(measurements: Sequence[dict[str, Any]]) -> list[Timed]:
    """Combine the rounds of each setting, sorted by tokens, batch and graph; ``in_round`` identifies a round."""
    settings: dict[tuple[int, int, bool], list[dict[str, Any]]] = defaultdict(list)
    for each in measurements:
        config = each["config"]
        settings[config["tokens"], config["batch"], config.get("graph", False)].append(each["figures"])
    found = []
    for (tokens, batch, graph), rounds in sorted(settings.items()):
        timed: Timed = {"tokens": tokens, "batch": batch, "graph": graph}
        samples = {figures["in_round"]: figures["seconds"] for figures in rounds if "seconds" in figures}
        if samples:
            peaks = [figures["peak_bytes"] for figures in rounds if figures.get("peak_bytes") is not None]
            timed |= {**summary(samples), "peak_bytes": peaks[0] if peaks else None}
        else:
            timed["reason"] = rounds[0]["reason"]
        found.append(timed)
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Fit cost = a * size^b by least squares of logarithms and return b; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit([math.log(x) for x in sizes], [math.log(y) for y in costs], 1)[0])


def _recall(measurements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise recall at the rate with the best median; ignore runs with another interval of tests than the newest."""
    if not measurements:
        return {"recall": {}, "learnability": None, "curves": []}
    looks = measurements[-1]["config"].get("looks")
    runs = [run_of(each["config"], each["figures"]) for each in measurements if each["config"].get("looks") == looks]
    learnt = learnability(runs)
    best = [run for run in runs if run["rate"] == learnt["rate"]]
    recall = {}
    for pairs in best[0]["shares"]:
        shares = [run["shares"][pairs] for run in best]
        recall[pairs] = {"median": median(shares), "low": min(shares), "high": max(shares), "seeds": len(shares)}
    return {"recall": recall, "learnability": learnt, "curves": [run["curve"] for run in best]}


def run_of(config: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Convert a recall measurement to a run as `learnability` expects it."""
    recall = {"recall": figures["curve"][-1][1], "curve": figures["curve"], "shares": figures["recall"]}
    return {"rate": config["rate"], "seed": config["seed"], **recall}


def problems(rows: Sequence[Row]) -> list[str]:
    """Describe caches that differ from their declaration, by size or because a constant cache grew."""
    found = []
    for row in rows:
        name = row["label"]
        sizes = {int(tokens): each for tokens, each in row["state"].items() if "reason" not in each}
        for tokens, each in sizes.items():
            if each["formula"] not in (None, each["allocated"]):
                found.append(
                    f"{name}: cache after {tokens:,} tokens: expected {each['formula']:,} bytes by its formula, got "
                    f"{each['allocated']:,}"
                )
        reach = (row["facts"] or {}).get("reach")
        kept = {each["allocated"] for tokens, each in sizes.items() if reach is not None and tokens >= reach}
        if len(kept) > 1:
            found.append(f"{name}: cache: expected a constant size, got {' and '.join(map(str, sorted(kept)))} bytes")
    return found
