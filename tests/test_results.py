"""The figures in the repository are those of the stored samples."""

import json
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from hybridattn.cli import CONTEXT_LENGTHS, _bytes
from hybridattn.evals.demo import TITLE
from hybridattn.evals.report import build, document, store
from hybridattn.evals.report.rows import TIMED
from hybridattn.measure.json_lines import JsonLines
from hybridattn.models.decoder.sizes import cache_bytes, parameters_of
from hybridattn.models.presets import PRESETS
from hybridattn.workshop.bench import GOALS, describe

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "results" / "demo"


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """What the stored measurements of the demo say."""
    return build.summarize(store.read(DEMO))


def test_the_report_is_made_of_the_stored_samples(demo: dict[str, Any]):
    report = (DEMO / "report.md").read_text(encoding="utf-8")
    assert report == build.as_markdown(TITLE, document.sections(demo), demo["problems"])


def test_printed_times_are_medians_of_the_stored_samples(demo: dict[str, Any]):
    """Counted here anew, from the lines of the file."""
    report = (DEMO / "report.md").read_text(encoding="utf-8")
    samples: dict[tuple[Any, ...], list[float]] = {}
    for each in store.read(DEMO):
        if each["kind"] in TIMED:
            config = each["config"]
            setting = (each["kind"], config["name"], config["tokens"], config["batch"])
            samples.setdefault(setting, []).extend(each["figures"]["seconds"])
    assert len(samples) == 8 * 5
    for (kind, name, tokens, batch), seconds in samples.items():
        (line,) = (line for line in _table(report, kind) if line.startswith(f"| {name} "))
        settings = sorted(key[2:] for key in samples if key[:2] == (kind, name))
        entry = line.split("|")[2 + settings.index((tokens, batch))]
        assert entry.strip().startswith(f"{median(seconds) * 1e3:,.3g} ("), (kind, name, tokens, batch)


def _table(report: str, kind: str) -> list[str]:
    """The lines of the table of times of one kind."""
    head = {"prefill": "| prefill, ms", "decode": "| decoding step, ms"}[kind]
    return report[report.index(head) :].split("\n\n")[0].splitlines()


def test_readme_has_the_figures_of_the_demo(demo: dict[str, Any]):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in readme_table(demo["rows"]):
        assert line in readme
    scores = demo["language_model"]["bits_per_byte"]
    assert f"**{scores['model']:.3f} bits per byte**" in readme
    assert all(f"{scores[f'order {order}']:.3f}" in readme for order in (2, 3, 4))


def test_the_page_on_speed_has_the_figures_of_the_benchmark():
    (goals,) = (x for x in JsonLines(ROOT / "results" / "bench" / "bench.jsonl").objects if x["workload"] == GOALS)
    for timed in goals["seconds"].values():
        assert timed["median"] == median(timed["rounds"].values())
    assert textwrap.indent(describe(goals), "  ") in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_page_on_choosing_layers_has_the_figures_of_the_demo(demo: dict[str, Any]):
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = {row["label"]: row for row in demo["rows"]}
    recall = {name: f"{row['recall']['32']['median']:.3f}" for name, row in rows.items()}
    size = {name: f"{row['state']['96']['allocated']:,}" for name, row in rows.items()}
    assert f"hold {recall['sliding window 16']} of 32 pairs, 64 tokens hold {recall['sliding window 64']}." in page
    based, softmax = "BASED, d' = 8", "softmax attention"
    assert f"recall {recall[based]} with {size[based]} bytes" in page
    assert f"of {softmax} have {size[softmax]}." in page


@pytest.mark.parametrize("preset", ["transformer_360m", "hybrid_340m", "gla_340m", "based_360m"])
def test_the_page_on_choosing_layers_has_the_sizes_of_presets(preset: str):
    config = PRESETS[preset]()
    sizes = [
        _bytes(cache_bytes(config, batch_size=1, tokens=tokens, dtype=torch.bfloat16))
        for tokens in CONTEXT_LENGTHS.values()
    ]
    (line,) = (x for x in (ROOT / "docs" / "choosing.md").read_text("utf-8").splitlines() if f"| `{preset}`" in x)
    assert line.endswith(f"| {sum(parameters_of(config)):,} | {' | '.join(sizes)} |")


@pytest.mark.slow
def test_the_report_on_linearising_is_made_of_its_results():
    from hybridattn.evals.linearize import report  # takes seconds to import

    folder = ROOT / "results" / "linearize"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / "report.md").read_text(encoding="utf-8") == report(results)
    page = (ROOT / "docs" / "linearise.md").read_text(encoding="utf-8")
    assert all(f" | {loss:.4f} | " in page for loss in results["losses"].values())
    assert f"{100 * results['recovery']:.1f} % of what the swap cost" in page


def readme_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of README's table, from the report's."""

    def rate(row: dict[str, Any], kind: str, tokens: int, batch: int) -> str:
        (timed,) = (each for each in row[kind] if (each["tokens"], each["batch"]) == (tokens, batch))
        faster = f" ({timed['speedup']['median']:.2f}x)" if timed["speedup"] else ""
        return f"{batch * (tokens if kind == 'prefill' else 1) / timed['median']:,.0f}{faster}"

    recall = {row["label"]: [f"{each['median']:.3f}" for each in row["recall"].values()] for row in rows}
    return [
        f"| {row['label']} | {' / '.join(recall[row['label']])} | "
        f"{row['state']['96']['allocated']:,} | {rate(row, 'prefill', 2048, 1)} | {rate(row, 'prefill', 8192, 1)} | "
        f"{rate(row, 'decode', 1024, 1)} | {rate(row, 'decode', 1024, 32)} |"
        for row in rows
    ]
