"""The task ``hybridattn_kv``: N lines ``key: value``, evenly spaced in filler text; the prompt queries one key."""

from functools import partial
from random import Random
from typing import Any

from hybridattn.evals.lm_eval.tasks.facts import distinct, number, word
from hybridattn.evals.lm_eval.tasks.grid import Cell, build

LOADS = (4, 16, 64, 256)


def row(rng: Random, cell: Cell) -> dict[str, Any]:
    """Generate a row with ``cell.load`` pairs; the queried pair is the one nearest to the cell's depth."""
    pairs = cell.load
    keys, values = distinct(partial(word, rng), pairs), distinct(partial(number, rng, 4), pairs)
    depths = [i / max(pairs - 1, 1) for i in range(pairs)]
    asked = round(cell.depth * (pairs - 1))
    facts = [(depth, f"{key}: {value}") for depth, key, value in zip(depths, keys, values, strict=True)]
    question = f"What is the value of {keys[asked]}?"
    return {
        "prompt": cell.fill_between(rng, facts, question, f"{keys[asked]}:"),
        "answers": [values[asked]],
        "load": pairs,
        "chance": 1 / pairs,
    }


def dataset(**options: Any) -> dict[str, Any]:
    """Build the task's data set; options as in `grid.build`."""
    return build("kv", row, **{"loads": LOADS, **options})
