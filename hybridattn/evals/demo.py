"""The demonstration: a language model on real text, and recall versus throughput, on this machine's CPU."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybridattn.evals.report.folder import RESULTS, check_output, written_aside

PARTS = ("text", "recall")


def run(
    *,
    out: Path | str = Path("reports/demo"),
    seeds: int = 1,
    steps: int | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run the demonstration and write ``results.json``, ``report.md``, ``pareto.png`` and ``model/``.

    Args:
        out: the folder to write, whole or not at all; an earlier report there is replaced.
        seeds: models trained per row of the recall part; the median is reported.
        steps: training steps of every model, instead of the recipes'; with few the figures mean nothing.
        only: the parts to run, of ``"text"`` and ``"recall"``; both if None or empty.

    Returns:
        The content of ``results.json``: ``provenance`` and one entry per part.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what was given.
        RuntimeError: a cache holds another number of bytes than the formula says, or the saved model cannot be used.
    """
    out, parts = Path(out), check_parts(only)
    check_positive("seeds", seeds)
    if steps is not None:
        check_positive("steps", steps)
    check_output(out)

    from hybridattn.evals.report.markdown import report
    from hybridattn.evals.report.provenance import provenance

    with written_aside(out) as folder:
        results: dict[str, Any] = {"provenance": provenance({"parts": parts, "seeds": seeds, "steps": steps})}
        if "text" in parts:
            results["text"] = run_text(folder, steps)
        if "recall" in parts:
            results["recall"] = run_recall(folder, seeds, steps)
        (folder / "report.md").write_text(report(results), encoding="utf-8")
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {', '.join(str(path) for path in sorted(out.iterdir()))}")
    return results
