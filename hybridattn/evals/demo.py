"""The demonstration: a language model on real text, and recall versus throughput, on this machine's CPU."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybridattn.measure.output_folder import RESULTS, check_output, written_aside

PARTS = ("text", "recall")


def run(
    *,
    out: Path | str = Path("reports/demo"),
    seeds: int = 2,
    steps: int | None = None,
    rounds: int | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run the demonstration and write ``results.json``, ``report.md``, ``model/`` and ``pareto/``, a report of its own.

    Args:
        out: the folder to write, whole or not at all; an earlier report there is replaced.
        seeds: models trained per row of the recall part; median and range are reported.
        steps: training steps of every model, instead of the recipes'; with few the figures mean nothing.
        rounds: times that every figure is timed again, instead of the suite's; with few the intervals are wide.
        only: the parts to run, of ``"text"`` and ``"recall"``; both if None or empty.

    Returns:
        The content of ``results.json``: ``provenance`` and one entry per part.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what was given.
        RuntimeError: a cache holds another number of bytes than the formula says, or the saved model cannot be used.
    """
    out, parts = Path(out), check_parts(only)
    check_positive("seeds", seeds)
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value is not None:
            check_positive(name, value)
    check_output(out)
    with written_aside(out) as folder:
        results = {part: PART_RUNS[part](folder, seeds, steps, rounds) for part in parts}
        write(folder, {"only": parts, "seeds": seeds, "steps": steps, "rounds": rounds}, results)
    print(f"\nIn {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return json.loads((out / RESULTS).read_text(encoding="utf-8"))


def check_parts(only: Sequence[str] | None) -> list[str]:
    """The parts to run, in their own order."""
    wanted = [only] if isinstance(only, str) else list(only or PARTS)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise ValueError(f"only: expected parts of {list(PARTS)}, got {unknown[0]!r}")
    if "recall" in wanted and find_spec("matplotlib") is None:
        raise ValueError(
            "only: expected 'text', got 'recall', which draws with matplotlib: pip install hybridattn[demo]"
        )
    return [part for part in PARTS if part in wanted]


def check_positive(name: str, value: int) -> None:
    """Check that an option is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def run_text(folder: Path, _seeds: int, steps: int | None, _rounds: int | None) -> dict[str, Any]:
    """The first part; prints its table and the sampled continuation."""
    from hybridattn.evals.report import markdown
    from hybridattn.evals.text import run as text

    result = text.run(folder / "model", steps=steps)
    sample = result["continuation"]
    print(f"\n{markdown.text_table(result)}\n")
    print(f"Sampled in a new process, {sample['tokens_per_second']:,.0f} tokens/s:\n")
    print(markdown.printable(sample["text"]), end="\n\n")
    return result


def run_recall(folder: Path, seeds: int, steps: int | None, rounds: int | None) -> dict[str, Any]:
    """The second part: the suite for CPUs, whose report lies in ``pareto``; prints its first table."""
    from hybridattn.evals.pareto import run as pareto
    from hybridattn.evals.pareto.suite import load
    from hybridattn.evals.report import document, markdown
    from hybridattn.evals.report.build import build

    suite = load("cpu", rounds=rounds)
    models = {name: {**entry, "steps": steps or entry["steps"]} for name, entry in suite.models.items()}
    pareto.run(replace(suite, models=models, seeds=tuple(range(seeds))), folder / "pareto")
    results = build(folder / "pareto", title="Recall and throughput")
    if results["problems"]:
        raise RuntimeError("; ".join(results["problems"]))
    (first,) = document.overview(results["rows"]).tables
    print(f"\n{markdown.table(first.heads, [[entry.text for entry in row] for row in first.rows])}")
    config = {row["config"]["name"]: row["config"] for row in results["rows"]}
    return {"config": config, "rows": results["rows"]}


PART_RUNS = {"text": run_text, "recall": run_recall}


def write(folder: Path, options: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the report and, last, the figures, with the provenance of both parts' configurations."""
    from hybridattn.evals.report import markdown
    from hybridattn.measure.provenance import provenance

    config = {"options": options, **{part: result["config"] for part, result in results.items()}}
    content = {"provenance": provenance(config), **results}
    (folder / "report.md").write_text(markdown.report(content), encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
