"""The records task: generated documents with attributes in lists, tables and sentences; it queries one attribute.

It resembles SWDE and FDA in the form of Arora et al., "Language models enable simple systems for generating structured
views of heterogeneous data lakes", 2023, arXiv:2304.09433. Generated data are in no training set and need no download.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from hybridattn.evals.lm_eval.tasks.facts import date, distinct, name, number, word
from hybridattn.evals.lm_eval.tasks.grid import Cell, build

LOADS = (1, 4, 16)
ATTRIBUTES: dict[str, Callable[[Random], str]] = {
    "director": name,
    "founding date": date,
    "headquarters": lambda rng: word(rng, 4).title(),
    "licence number": lambda rng: f"{word(rng, 1).upper()}-{number(rng, 6)}",
    "telephone number": lambda rng: number(rng, 8),
    "yearly revenue": lambda rng: f"${number(rng, 3)}.{number(rng, 3)} million",
}
STYLES = ("{label}: {value}", "| {label} | {value} |", "The {attribute} of {owner} is {value}.")


def row(rng: Random, cell: Cell) -> dict[str, Any]:
    """Generate a row with ``cell.load`` documents; the queried document is the one nearest to the cell's depth."""
    owners = distinct(partial(name, rng), cell.load)
    columns = {attribute: distinct(partial(draw, rng), cell.load) for attribute, draw in ATTRIBUTES.items()}
    asked, attribute = round(cell.depth * (cell.load - 1)), rng.choice(list(ATTRIBUTES))
    facts = []
    for i, owner in enumerate(owners):
        values = {attribute: column[i] for attribute, column in columns.items()}
        facts.append((i / (cell.load - 1) if cell.load > 1 else cell.depth, document(rng, owner, values)))
    subject = f"the {attribute} of {owners[asked]}"
    return {
        "prompt": cell.fill_between(rng, facts, f"What is {subject}?", f"T{subject[1:]} is"),
        "answers": [columns[attribute][asked]],
        "load": cell.load,
        "chance": 1 / (cell.load * len(ATTRIBUTES)),
    }


def document(rng: Random, owner: str, values: dict[str, str]) -> str:
    """Return a document: a heading and a line for every attribute, in random order and style."""
    lines = [
        rng.choice(STYLES).format(label=attribute.capitalize(), attribute=attribute, owner=owner, value=value)
        for attribute, value in rng.sample(list(values.items()), len(values))
    ]
    return "\n".join([f"## {owner}", *lines])


def dataset(**options: Any) -> dict[str, Any]:
    """Build the task's data set; options as in `grid.build`."""
    return build("records", row, **{"loads": LOADS, **options})
