"""Write a report from the measurements in a folder: a self-contained HTML page, Markdown, JSON and pictures."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from hybridattn.evals.report import document, plots, store
from hybridattn.evals.report.fronts import points
from hybridattn.evals.report.rows import problems, rows
from hybridattn.measure import markdown
from hybridattn.measure.output_folder import RESULTS

PAGE = Path(__file__).with_name("page.html")


def build(out: Path, *, title: str) -> dict[str, Any]:
    """Write ``report.html``, ``report.md``, ``results.json`` and PNGs from the measurements of a folder.

    Returns:
        The content of ``results.json``: ``rows`` (see `rows.rows`), ``points`` of the fronts, ``language_model``,
        ``problems``, ``probes`` (seconds of the CPU probe, by device and threads), and ``provenance``, one entry per
        device, versions and commit of the measurements.

    Raises:
        ValueError: there are no measurements, or a measurement lacks its provenance.
    """
    results = summarize(store.read(out))
    parts = document.sections(results)
    drawn = plots.plots(results["rows"], results["points"])
    for name, figure in drawn.items():
        plots.save(figure, out / f"{name}.png")
    texts = {
        "report.md": as_markdown(title, parts, results["problems"]),
        "report.html": as_page(title, parts, {name: plots.svg(figure) for name, figure in drawn.items()}, results),
        RESULTS: json.dumps(results, indent=1) + "\n",
    }
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)  # atomic
    return results


def summarize(found: Sequence[store.Measurement]) -> dict[str, Any]:
    """Compute the content of ``results.json`` (see `build`) from measurements."""
    made = rows(found)
    texts = [each["figures"] for each in found if each["kind"] == "language_model"]
    probes = defaultdict(list)
    for each in (each for each in found if "probe" in each["figures"]):
        probes[f"{each['provenance']['device']}, {each['config']['threads']} threads"] += each["figures"]["probe"]
    return {
        "rows": made,
        "points": points(made),
        "language_model": texts[-1] if texts else None,
        "problems": problems(made),
        "probes": dict(probes),
        "provenance": sources(found),
    }


def sources(found: Sequence[store.Measurement]) -> list[dict[str, Any]]:
    """List the distinct origins of measurements (device, machine, versions, commit) with their number and dates."""

    def source_of(measurement: store.Measurement) -> str:
        return json.dumps(measurement["provenance"], sort_keys=True)

    origins = []
    for _, group in groupby(sorted(found, key=source_of), key=source_of):
        members = list(group)
        dates = [f"{each['date'][:19]}Z" for each in members]
        count = {"measurements": len(members), "first": min(dates), "last": max(dates)}
        origins.append({**members[0]["provenance"], **count})
    return origins


def summary(results: dict[str, Any]) -> str:
    """Return one line about the report: numbers of configurations and measurements, devices and date."""
    devices = dict.fromkeys(source["device"] for source in results["provenance"])
    last = max(source["last"] for source in results["provenance"])
    count = sum(source["measurements"] for source in results["provenance"])
    rows = len(results["rows"])
    return f"{rows} configuration{'s' if rows != 1 else ''}, {count} measurements, {' and '.join(devices)}, {last[:10]}"


def as_markdown(title: str, parts: Sequence[document.Section], problem_lines: Sequence[str]) -> str:
    """Return the report as Markdown, which refers to the PNGs in the same folder."""
    text = [f"# {title}"]
    if problem_lines:
        text += ["These caches differ from their declaration:", "\n".join(f"- {each}" for each in problem_lines)]
    for part in parts:
        text += [f"## {part.title}", *part.texts]
        if part.figure:
            text.append(f"![{part.title}]({part.figure}.png)")
            text += [part.caption] if part.caption else []
        text += map(as_table, part.tables)
        text += [markdown.fenced(part.code)] if part.code else []
    return "\n\n".join(text) + "\n"


def as_table(table: document.Table) -> str:
    """Return a table as Markdown."""
    return markdown.table(table.heads, [[entry.text for entry in row] for row in table.rows])


def as_page(title: str, parts: Sequence[document.Section], drawn: dict[str, str], results: dict[str, Any]) -> str:
    """Return the report as one HTML file, which contains the pictures and the JSON results."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        PAGE.read_text(encoding="utf-8")
    )
    views = [
        {
            **vars(part),
            "id": part.title.lower().replace(" ", "-").replace(",", ""),
            "figure": drawn.get(part.figure or ""),
            "code": part.code and markdown.printable(part.code),
        }
        for part in parts
    ]
    # Escape "<", so that "</script>" in the JSON does not end the script element.
    embedded = json.dumps(results).replace("<", "\\u003c")
    return template.render(
        title=title, summary=summary(results), problems=results["problems"], sections=views, json=embedded
    )
