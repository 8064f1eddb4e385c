"""Answers by length, depth and load: the table, the cells and the Markdown of `hybridattn eval`."""

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
    """Tasks and their samples, in the order of names, from the files that lm-eval writes with ``--log_samples``."""
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        yield task, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a task's samples say: ``rows``, ``contains``, and of tasks with cells ``chance`` and ``cells``.

    A cell holds the mean of its rows: ``length``, ``depth``, ``load`` (the lower end of its octave, since a phone book
    holds what fits), ``rows``, ``contains``, ``chance``.
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
    """Number and means of some samples of a cell."""
    return {
        "rows": len(samples),
        "contains": fmean(sample["contains"] for sample in samples),
        "chance": fmean(sample["doc"]["chance"] for sample in samples),
    }


def by(cells: Sequence[dict[str, Any]], axis: str) -> dict[Any, float]:
    """The score of every value of an axis, over all rows that have it."""
    groups = defaultdict(list)
    for cell in cells:
        groups[cell[axis]].append(cell)
    return {value: weighted(group) for value, group in sorted(groups.items())}


def weighted(cells: Sequence[dict[str, Any]]) -> float:
    """The mean over the rows of some cells."""
    return sum(cell["contains"] * cell["rows"] for cell in cells) / sum(cell["rows"] for cell in cells)


def panels(found: dict[str, Any]) -> list[Panel]:
    """The maps of a task's cells: length by depth and length by load, where that varies."""
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
    """The whole report as Markdown, built from the values of results.json alone."""
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
        f"Share of answers that the completion contains, on {results['device']}. "
        f"Prompts truncated: {results['truncated']}. Parity, before the first score: {gates}.",
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
    """A sentence and a table: lengths down, positions across."""
    spans = max(found["lengths"].values(), key=len)
    rows = [
        [f"{int(length):,}", *(f"{span['bits']:.3f}" for span in of_length), *[""] * (len(spans) - len(of_length))]
        for length, of_length in found["lengths"].items()
    ]
    return [
        f"Held-out sources of Python's standard library, {found['bytes_per_token']:.2f} bytes per token; the model was "
        f"trained on {found['trained']:,} tokens.",
        table(["tokens", *(f"from {span['first']:,}" for span in spans)], rows),
    ]
