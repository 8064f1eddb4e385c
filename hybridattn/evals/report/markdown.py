"""The report as Markdown, built from the values of results.json alone."""

from collections.abc import Sequence
from typing import Any

from hybridattn.evals.report import document


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded to read well in a terminal too; the first column is text, the others are figures."""
    heads, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (heads, *rows))
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(row, widths) for row in (heads, rule, *rows))


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table."""
    first, *others = zip(cells, widths, strict=True)
    return " | ".join(["| " + first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def text_table(text: dict[str, Any]) -> str:
    """Bits per byte of the model and of the n-gram models."""
    scores = text["bits_per_byte"]
    return table(["bits per byte, held out", *scores], [["", *(f"{score:.3f}" for score in scores.values())]])


def report(results: dict[str, Any]) -> str:
    """The whole report: each part that was run, then where the figures come from."""
    parts = ["# hybridattn demo"]
    if "text" in results:
        parts += text_part(results["text"])
    if "recall" in results:
        parts += recall_part(results["recall"])
    return "\n\n".join([*parts, *origin(results["provenance"])]) + "\n"


def text_part(text: dict[str, Any]) -> list[str]:
    """The paragraphs on language modelling."""
    corpus, training, sample = text["corpus"], text["training"], text["continuation"]
    return [
        "## Real text",
        f"A byte-level hybrid of {text['parameters']:,} parameters ({', '.join(text['config']['model']['mixers'])}), "
        f"trained for {training['seconds']:.0f} s ({training['steps']} steps, {training['tokens_per_second']:,.0f} "
        f"tokens/s, {training['threads']} threads{', bf16' if training['bf16'] else ''}) on the Python standard "
        f"library: {corpus['train_bytes']:,} bytes in {corpus['train_files']} files, {corpus['held_out_files']} other "
        "files held out. Beside it interpolated Witten-Bell models of order 0 to 4, fitted to the same files, scored "
        f"on the same {text['scored_bytes']:,} bytes: the last 256 of every 512-byte window.",
        text_table(text),
        "Reloaded from `model/` in a new process with `AutoModelForCausalLM` and `AutoTokenizer` and sampled at "
        f"temperature 0.8, {sample['tokens_per_second']:,.0f} tokens/s ({sample['threads']} thread):",
        fenced(sample["text"]),
    ]


def fenced(text: str) -> str:
    """A code block holding any text."""
    text, fence = printable(text), "````"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def recall_part(recall: dict[str, Any]) -> list[str]:
    """The paragraphs on recall and throughput: what the suite's report begins with."""
    overview = document.overview(recall["rows"])
    tables = [table(each.heads, [[entry.text for entry in row] for row in each.rows]) for each in overview.tables]
    return [
        "## Recall and throughput",
        "![Recall against state bytes and against decode speed](pareto/pareto.png)",
        *overview.texts,
        *tables,
        "More of it is in [the report](pareto/report.md), and in `pareto/report.html`, which opens without a network.",
    ]


def origin(provenance: dict[str, Any]) -> list[str]:
    """The paragraphs on machine, versions and configuration."""
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    facts = {
        "CPU": f"{provenance['cpu']}, {provenance['cores']} cores, {provenance['platform']}",
        "versions": versions,
        "commit": provenance["commit"],
        "date": provenance["date"],
        "configuration": f"sha256 {provenance['config_sha256']} (results.json)",
    }
    return ["## Where the figures come from", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
