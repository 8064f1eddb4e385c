"""Markdown for reports: tables, code blocks, and the paragraph on where figures come from."""

from collections.abc import Sequence
from typing import Any


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


def fenced(text: str) -> str:
    """A code block holding any text."""
    text, fence = printable(text), "````"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


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
