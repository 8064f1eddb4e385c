"""A report from a folder of cells: a page that opens without a network, Markdown, JSON and pictures."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from hybridattn.evals.report import cells, document, figures, markdown
from hybridattn.evals.report.rows import points, problems, rows
from hybridattn.measure.output_folder import RESULTS

PAGE = Path(__file__).with_name("page.html")


def build(out: Path, *, title: str) -> dict[str, Any]:
    """Write ``report.html``, ``report.md``, ``results.json`` and PNGs from the cells of a folder.

    Returns:
        The content of ``results.json``: ``rows`` (see `rows.rows`), ``points`` of the fronts, ``kernels``,
        ``problems`` and ``provenance``, one entry per device, versions and commit that figures come from.

    Raises:
        ValueError: there are no cells, or one does not say where it comes from.
    """
    found = cells.read(out)
    made = rows(found)
    kernels = [json.loads(line) for line in cells.kernel_lines(out)]
    results = {
        "rows": made,
        "points": points(made),
        "kernels": kernels,
        "problems": problems(made),
        "provenance": sources(found),
    }
    parts = document.sections(made, results["points"], kernels, results["provenance"])
    drawn = figures.figures(made, results["points"], [line for line in kernels if "reason" not in line])
    for name, figure in drawn.items():
        figures.save(figure, out / f"{name}.png")
    (out / "report.md").write_text(as_markdown(title, parts, results["problems"]), encoding="utf-8")
    page = as_page(title, parts, {name: figures.svg(figure) for name, figure in drawn.items()}, results)
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def sources(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where cells come from: device, machine, versions and commit, once each, with their number and dates."""
    alike = ("device", "cpu", "cores", "platform", "versions", "commit")

    def origin(cell: dict[str, Any]) -> str:
        return json.dumps([cell["provenance"][name] for name in alike], sort_keys=True)

    told = []
    for _, group in groupby(sorted(found, key=origin), key=origin):
        members = list(group)
        dates = [cell["provenance"]["date"] for cell in members]
        source = {name: members[0]["provenance"][name] for name in alike}
        told.append({**source, "cells": len(members), "first": f"{min(dates)[:19]}Z", "last": f"{max(dates)[:19]}Z"})
    return told


def summary(results: dict[str, Any]) -> str:
    """A line for the head of the page."""
    devices = dict.fromkeys(source["device"] for source in results["provenance"])
    last = max(source["last"] for source in results["provenance"])
    count = sum(source["cells"] for source in results["provenance"])
    rows = len(results["rows"])
    return f"{rows} configuration{'s' if rows != 1 else ''}, {count} figures, on {' and '.join(devices)}, {last[:10]}"


def as_markdown(title: str, parts: Sequence[document.Section], contradictions: Sequence[str]) -> str:
    """The report for a terminal or a repository, with the PNGs beside it."""
    text = [f"# {title}"]
    if contradictions:
        text += ["These figures contradict each other:", "\n".join(f"- {each}" for each in contradictions)]
    for part in parts:
        text += [f"## {part.title}", *part.texts]
        if part.figure:
            text.append(f"![{part.title}]({part.figure}.png)")
            text.append(part.caption)
        for table in part.tables:
            text.append(markdown.table(table.heads, [[entry.text for entry in row] for row in table.rows]))
    return "\n\n".join(text) + "\n"


def as_page(title: str, parts: Sequence[document.Section], drawn: dict[str, str], results: dict[str, Any]) -> str:
    """The report as one HTML file, pictures and figures included."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        PAGE.read_text(encoding="utf-8")
    )
    views = [
        {
            "id": part.title.lower().replace(" ", "-").replace(",", ""),
            "title": part.title,
            "texts": part.texts,
            "tables": part.tables,
            "figure": drawn.get(part.figure or ""),
            "caption": part.caption,
        }
        for part in parts
    ]
    # What ends a script element inside JSON is written so that it does not.
    embedded = json.dumps(results).replace("<", "\\u003c")
    return template.render(
        title=title, summary=summary(results), problems=results["problems"], sections=views, json=embedded
    )
