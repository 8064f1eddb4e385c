"""Run the demo in minutes on a CPU: train a small language model, and measure recall, memory and speed of mixers."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridattn.evals.pareto.suite import Suite
    from hybridattn.evals.report.store import Store

PARTS = ("text", "recall")
TITLE = "hybridattn demo"


def run_demo(
    *, out: Path | str = Path("reports/demo"), steps: int | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train, generate, measure, and write a report; resume if the folder has measurements of an interrupted run.

    Args:
        out: folder of measurements, models and report.
        steps: training steps of every model, instead of the recipes'; too few steps give meaningless results.
        only: parts to run, of ``"text"`` and ``"recall"``; both if None or empty.

    Returns:
        The content of the report's ``results.json``.

    Raises:
        ValueError: a bad argument; the message has its name, the expected and the given value.
    """
    wanted = [only] if isinstance(only, str) else [*(only or PARTS)]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ValueError(f"only: expected parts of {list(PARTS)}, got {unknown[0]!r}")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps: expected a positive integer, got {steps!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("demo: expected matplotlib, got no such package; pip install 'hybridattn[demo]'")
    from hybridattn.evals.pareto import run_suite
    from hybridattn.evals.report.build import build
    from hybridattn.evals.report.store import Store

    out, results = Path(out), {}
    if "text" in wanted:
        measure_text(Store(out), steps)
        results = build(out, title=TITLE)
    if "recall" in wanted:
        results = run_suite.run_suite(suite(steps), out, title=TITLE)
    return results


def measure_text(store: "Store", steps: int | None) -> None:
    """Train the language model and sample from it, unless the store has its results; print scores and sampled text."""
    from hybridattn.evals.text import language_model
    from hybridattn.measure import markdown
    from hybridattn.measure.provenance import cpu_name

    config, folder = language_model.configuration(steps), store.out / "model"
    newest = [each for each in store.found.values() if each["kind"] == "language_model"][-1:]
    # Only the newest measurement belongs to the model in the folder.
    found = newest[0]["figures"] if newest and newest[0]["config"] == config else None
    if found is None or not (folder / "config.json").is_file():
        found = language_model.measure(folder, steps=steps)
        store.add("language_model", config, found, device=cpu_name())
    scores, sample = found["bits_per_byte"], found["continuation"]
    print("bits per byte, held out:", ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    print(f"sampled in a new process, {sample['tokens_per_second']:,.0f} tokens/s:\n")
    print(markdown.printable(sample["text"]), end="\n\n", flush=True)


def suite(steps: int | None = None) -> "Suite":
    """Return the suite "cpu", shortened to minutes: one seed, fewer rounds, lengths up to 8,192 tokens."""
    from hybridattn.evals.pareto.suite import load

    cpu = load("cpu")
    models = {name: {**entry, "steps": steps or entry["steps"]} for name, entry in cpu.models.items()}
    return replace(
        cpu,
        models=models,
        seeds=cpu.seeds[:1],
        rounds=5,
        seconds=0.1,
        state=(96, 1024),
        prefill=(2048, 8192),
        decode=((1024, 1), (8192, 1), (1024, 32)),
        training=(),
        memory=None,
    )
