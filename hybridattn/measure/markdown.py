"""Markdown of reports: tables, code blocks, and the section on machine, versions and configuration."""

from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded for terminals.

    Args:
        heads: titles of the columns; the first column is aligned left, the others right.
        rows: cells.
    """
    heads, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (heads, *rows))
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(row, widths) for row in (heads, rule, *rows))


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table, padded to the widths of the columns in characters."""
    first, *others = zip(cells, widths, strict=True)
    return " | ".join(["| " + first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def fenced(text: str) -> str:
    """Return a code block with the text; the fence is longer than any fence in the text."""
    text, fence = printable(text), "````"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def printable(text: str) -> str:
    """Replace control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def origin(provenance: dict[str, Any]) -> list[str]:
    """Return the heading and the list on machine, versions and configuration, from ``provenance``."""
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    facts = {
        "CPU": f"{provenance['cpu']}, {provenance['cores']} cores, {provenance['platform']}",
        "versions": versions,
        "commit": provenance["commit"],
        "date": provenance["date"],
        "configuration": f"sha256 {provenance['config_sha256']} (results.json)",
    }
    return ["## Where the figures come from", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
