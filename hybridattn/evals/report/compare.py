"""What changed between two reports beyond noise."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridattn.evals.report import cells
from hybridattn.evals.report.rows import rows
from hybridattn.measure.markdown import table
from hybridattn.measure.output_folder import RESULTS

Change = tuple[str, str, str, str, str]
"""Row, figure, old, new, and the new one over the old one."""


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the rows of two reports by name, so that rows that were configured anew, or on another device, compare.

    Where a report has several rows of a name, they compare by their labels, which tell them apart.

    A time changed if the intervals of its medians do not overlap; recall, if the ranges over the seeds do not; bytes
    and the number of parameters, if they differ at all.

    Returns:
        ``changes``, ``compared`` (the number of figures in both), ``gone`` and ``come``, rows in one only, and
        figures, as "row: figure", in one only of rows in both.
    """
    before, after = ({row["label"]: row for row in each} for each in (old, new))
    changes: list[Change] = []
    compared, gone, come = 0, sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    for name in sorted(before.keys() & after.keys()):
        left, right = dict(_figures(before[name])), dict(_figures(after[name]))
        gone += [f"{name}: {figure}" for figure in left if figure not in right]
        come += [f"{name}: {figure}" for figure in right if figure not in left]
        for figure in left.keys() & right.keys():
            compared += 1
            (a, low_a, high_a, text), (b, low_b, high_b, _) = left[figure], right[figure]
            if low_a > high_b or low_b > high_a:
                ratio = f"{b / a:.2f}" if a else ""
                changes.append((name, figure, text.format(a), text.format(b), ratio))
    return {
        "changes": sorted(changes),
        "compared": compared,
        "gone": gone,
        "come": come,
    }


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float, float, str]]]:
    """Name, (value, lowest and highest that is the same within noise, format) of everything a row has."""
    for pairs, found in row["recall"].items():
        yield f"recall, {pairs} pairs", (found["median"], found["low"], found["high"], "{:.3f}")
    for tokens, sizes in row["state"].items():
        if "reason" not in sizes:
            yield f"state after {tokens} tokens, bytes", (*[sizes["allocated"]] * 3, "{:,}")
    if "parameters" in (row["facts"] or {}):
        yield "parameters", (*[row["facts"]["parameters"]] * 3, "{:,}")
    for kind in ("prefill", "decode", "training"):
        for timed in row[kind]:
            if "median" in timed:
                graph = ", CUDA graph" if timed["graph"] else ""
                name = f"{kind}, {timed['tokens']} tokens, batch {timed['batch']}{graph}, s"
                yield name, (timed["median"], timed["low"], timed["high"], "{:.3g}")
    if "batch" in (row["largest_batch"] or {}):
        yield "largest batch", (*[row["largest_batch"]["batch"]] * 3, "{:,}")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a report, from its cells or, where only the report was kept, from its ``results.json``.

    Raises:
        ValueError: neither is there.
    """
    if (folder / cells.CELLS).is_dir() or not (folder / RESULTS).is_file():
        return rows(cells.read(folder))
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))["rows"]


def report(old: Path, new: Path) -> str:
    """The comparison of two folders as Markdown."""
    found = compare(read(old), read(new))
    text = [f"{found['compared']} figures in both, {len(found['changes'])} of them changed beyond noise."]
    if found["changes"]:
        text.append(table(["row", "figure", "old", "new", "new / old"], found["changes"]))
    text += [f"Only in {old}: {'; '.join(found['gone'])}."] if found["gone"] else []
    text += [f"Only in {new}: {'; '.join(found['come'])}."] if found["come"] else []
    return "\n\n".join(text)
