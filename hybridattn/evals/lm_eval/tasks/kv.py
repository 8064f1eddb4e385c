"""Key-value pairs in real text: N lines ``key: value`` spread evenly over it, one key is asked."""

from functools import partial
from random import Random
from typing import Any

from hybridattn.evals.lm_eval.tasks.facts import distinct, number, word
from hybridattn.evals.lm_eval.tasks.grid import Cell, build

LOADS = (4, 16, 64, 256)


def row(rng: Random, cell: Cell) -> dict[str, Any]:
    """One prompt with ``cell.load`` pairs; the asked one is the nearest to the depth."""
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
    """The task's data; `grid.build` says which options there are."""
    return build("kv", row, **{"loads": LOADS, **options})
