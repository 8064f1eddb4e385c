"""Compare two reports and list the figures that changed.

A machine's speed drifts between runs. A row's times are therefore compared as ratios to the baseline of the same
report, which was timed in the same rounds. Only the baseline's own times are compared in seconds.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridattn.evals.report import store
from hybridattn.evals.report.rows import TIMED, Row, rows
from hybridattn.measure.markdown import table


class Figure(NamedTuple):
    """A value and the range of its repetitions (rounds or seeds); ``text`` is the format string of the value."""

    value: float
    low: float
    high: float
    text: str


def compare(old: Sequence[Row], new: Sequence[Row]) -> dict[str, Any]:
    """Compare the rows of two reports that have equal labels; their configurations may differ.

    A figure changed if the ranges of its old and new value do not overlap. The range of a time is over the rounds, of
    ratios to the baseline or, for the baseline itself, of medians. The range of recall is over the seeds. Bytes and
    numbers of parameters have no range.

    Returns:
        ``changes``, tuples of row, figure, old, new, and new / old; ``compared``, the number of figures in both
        reports; ``gone`` and ``come``, the rows, and the figures as "row: figure", that only the old or only the new
        report has.
    """
    before, after = ({row["label"]: row for row in each} for each in (old, new))
    changes: list[tuple[str, str, str, str, str]] = []
    compared, gone, come = 0, sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    for label in sorted(before.keys() & after.keys()):
        left, right = dict(_figures(before[label])), dict(_figures(after[label]))
        gone += [f"{label}: {name}" for name in left if name not in right]
        come += [f"{label}: {name}" for name in right if name not in left]
        for name in left.keys() & right.keys():
            compared += 1
            a, b = left[name], right[name]
            if a.low > b.high or b.low > a.high:
                ratio = f"{b.value / a.value:.2f}" if a.value else ""
                changes.append((label, name, a.text.format(a.value), b.text.format(b.value), ratio))
    return {"changes": sorted(changes), "compared": compared, "gone": gone, "come": come}


def _figures(row: Row) -> Iterator[tuple[str, Figure]]:
    """Yield the name and value of every figure of a row."""
    for pairs, found in row["recall"].items():
        yield f"recall, {pairs} pairs", Figure(found["median"], found["low"], found["high"], "{:.3f}")
    for tokens, sizes in row["state"].items():
        if "reason" not in sizes:
            yield f"state after {tokens} tokens, bytes", _certain(sizes["allocated"])
    if "parameters" in (row["facts"] or {}):
        yield "parameters", _certain(row["facts"]["parameters"])
    for kind in TIMED:
        for timed in row[kind]:
            if "median" not in timed:
                continue
            graph = ", CUDA graph" if timed["graph"] else ""
            name = f"{kind}, {timed['tokens']} tokens, batch {timed['batch']}{graph}"
            if ratio := timed["speedup"]:
                value = Figure(ratio["median"], ratio["low"], ratio["high"], "{:.2f}")
                yield f"{name}, speed over {row['baseline']}", value
            elif row["baseline"] in (None, row["label"]):
                medians = timed["rounds"].values()
                yield f"{name}, s", Figure(timed["median"], min(medians), max(medians), "{:.3g}")
    if "batch" in (row["largest_batch"] or {}):
        largest = row["largest_batch"]
        yield (
            f"largest batch after {largest['tokens']} tokens in {largest['budget']} bytes",
            _certain(row["largest_batch"]["batch"]),
        )


def _certain(value: float) -> Figure:
    return Figure(value, value, value, "{:,}")


def report(old: Path, new: Path) -> str:
    """Compare two reports by their folders; return Markdown."""
    found = compare(rows(store.read(old)), rows(store.read(new)))
    text = [f"{found['compared']} figures in both reports; the ranges of {len(found['changes'])} do not overlap."]
    if found["changes"]:
        text.append(table(["row", "figure", "old", "new", "new / old"], found["changes"]))
    text += [f"Only in {old}: {'; '.join(found['gone'])}."] if found["gone"] else []
    text += [f"Only in {new}: {'; '.join(found['come'])}."] if found["come"] else []
    return "\n\n".join(text)
