"""Aggregate lm-eval's samples by length, depth and load, and write the Markdown report of `hybridattn eval`."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hybridattn.evals.lm_eval.heatmap import Panel
from hybridattn.measure.markdown import origin, table

AXES = ("length", "depth", "load")


def read_samples(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield tasks and their samples, sorted by name, from the files that lm-eval writes with ``--log_samples``."""
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        yield task, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise a task's samples: ``rows``, ``contains``, and for tasks with cells ``chance`` and ``cells``.

    A cell has ``length``, ``depth``, ``load``, ``rows``, and the means ``contains`` and ``chance`` of its rows. Loads
    are rounded down to powers of two, since the number of entries in a phone book varies.
    """
    cells = defaultdict(list)
    for sample in samples:
        if (doc := sample["doc"]).keys() >= {*AXES, "chance"}:
            cells[doc["length"], doc["depth"], 1 << doc["load"].bit_length() - 1].append(sample)
    found = {"rows": len(samples), "contains": fmean(sample["contains"] for sample in samples)}
    if not cells:
        return found
    means = [{**dict(zip(AXES, key, strict=True)), **mean(rows)} for key, rows in sorted(cells.items())]
    return {**found, "chance": mean(samples)["chance"], "cells": means}


def mean(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of samples and their means."""
    return {
        "rows": len(samples),
        "contains": fmean(sample["contains"] for sample in samples),
        "chance": fmean(sample["doc"]["chance"] for sample in samples),
    }


def by(cells: Sequence[dict[str, Any]], axis: str) -> dict[Any, float]:
    """Return the mean score for every value of an axis, over all rows with this value."""
    groups = defaultdict(list)
    for cell in cells:
        groups[cell[axis]].append(cell)
    return {value: weighted(group) for value, group in sorted(groups.items())}


def weighted(cells: Sequence[dict[str, Any]]) -> float:
    """Return the mean score over all rows of the cells."""
    return sum(cell["contains"] * cell["rows"] for cell in cells) / sum(cell["rows"] for cell in cells)


def panels(found: dict[str, Any]) -> list[Panel]:
    """Return the heat maps of a task's cells: length by depth and length by load, if these vary."""
    cells = found.get("cells", [])
    lengths = sorted({cell["length"] for cell in cells})
    maps = []
    for axis in AXES[1:]:
        values = sorted({cell[axis] for cell in cells})
        if len(values) > 1:
            scores = np.full((len(values), len(lengths)), np.nan)
            for i, value in enumerate(values):
                of_value = [cell for cell in cells if cell[axis] == value]
                for length, score in by(of_value, "length").items():
                    scores[i, lengths.index(length)] = score
            maps.append(Panel("length", axis, lengths, values, scores))
    return maps


def report(results: dict[str, Any]) -> str:
    """Return the report as Markdown, from the content of results.json."""
    tasks = results["tasks"]
    gates = ", ".join(
        f"{gate} (error {result['error']:.1e}, tolerance {result['tolerance']:.0e})"
        for gate, result in results["parity"].items()
    )
    totals = [
        [task, f"{found['rows']:,}", f"{found['contains']:.3f}", f"{found['chance']:.3f}" if "chance" in found else ""]
        for task, found in tasks.items()
    ]
    parts = [
        f"# Recall of {results['model']}",
        f"Scores are the share of answers that the completion contains, on {results['device']}. "
        f"Truncated prompts: {results['truncated']}. Parity gates: {gates}.",
        table(["task", "rows", "contains", "chance"], totals),
    ]
    for axis in AXES:
        scores = {task: by(found["cells"], axis) for task, found in tasks.items() if "cells" in found}
        values = sorted({value for of_task in scores.values() for value in of_task})
        if len(values) > 1:
            rows = [
                [task, *(f"{of_task[value]:.3f}" if value in of_task else "" for value in values)]
                for task, of_task in scores.items()
            ]
            parts += [f"## By {axis}", table(["task", *(f"{value:,}" for value in values)], rows)]
    if found := results.get("positions"):
        parts += ["## Bits per token by position", *_positions(found)]
    return "\n\n".join([*parts, *origin(results["provenance"])]) + "\n"


def _positions(found: dict[str, Any]) -> list[str]:
    """Return a sentence and a table of bits per token: a row per length, a column per range of positions."""
    spans = max(found["lengths"].values(), key=len)
    rows = [
        [f"{int(length):,}", *(f"{span['bits']:.3f}" for span in of_length), *[""] * (len(spans) - len(of_length))]
        for length, of_length in found["lengths"].items()
    ]
    return [
        f"Held-out sources of Python's standard library, {found['bytes_per_token']:.2f} bytes per token; the model was "
        f"trained on sequences of {found['trained']:,} tokens.",
        table(["tokens", *(f"from {span['first']:,}" for span in spans)], rows),
    ]
