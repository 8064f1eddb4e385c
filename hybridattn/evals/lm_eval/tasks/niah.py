"""Needle-in-a-haystack tasks: sentences ``The magic number of KEY is VALUE.`` in filler text, in RULER's four kinds.

Keys are random words and the filler is a local text, so that nothing is downloaded. Source: Hsieh et al., "RULER:
What's the real context size of your long-context language models?", 2024, arXiv:2404.06654, section 3.1.
"""

from functools import partial
from random import Random
from typing import Any, NamedTuple

from hybridattn.evals.lm_eval.tasks.facts import distinct, number, word
from hybridattn.evals.lm_eval.tasks.grid import Cell, build


class Kind(NamedTuple):
    """Numbers of keys, of values per key, and of queried keys."""

    keys: int
    values: int
    asked: int


KINDS = {
    "single": Kind(1, 1, 1),
    "multikey": Kind(4, 1, 1),
    "multivalue": Kind(1, 4, 1),
    "multiquery": Kind(4, 1, 4),
}


def row(rng: Random, cell: Cell, *, kind: Kind) -> dict[str, Any]:
    """Generate a row. The first needle is at the cell's depth; the others follow evenly spaced, cyclically."""
    keys = distinct(partial(word, rng, 4), kind.keys)
    values = distinct(partial(number, rng, 7), kind.keys * kind.values)
    needles = [(keys[i // kind.values], value) for i, value in enumerate(values)]
    depths = [cell.depth, *((cell.depth + i / len(needles)) % 1 for i in range(1, len(needles)))]
    facts = [
        (depth, f"The magic number of {key} is {value}.") for depth, (key, value) in zip(depths, needles, strict=True)
    ]
    answers = values[: kind.asked * kind.values]
    subject = listed(keys[: kind.asked])
    numbers, are = ("number", "is") if len(answers) == 1 else ("numbers", "are")
    return {
        "prompt": cell.fill_between(
            rng, facts, f"What {are} the magic {numbers} of {subject}?", f"The magic {numbers} of {subject} {are}"
        ),
        "answers": answers,
        "load": len(needles),
        # A random value is an answer with probability answers / needles, and then scores 1 / answers.
        "chance": 1 / len(needles),
    }


def listed(words: list[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def dataset(kind: str, **options: Any) -> dict[str, Any]:
    """The data of one of `KINDS`; `grid.build` says which options there are."""
    return build(f"niah {kind}", partial(row, kind=KINDS[kind]), **{**options, "loads": (1,)})
