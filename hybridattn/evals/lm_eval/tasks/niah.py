"""Needles in a haystack of real text: sentences ``The magic number of KEY is VALUE.``, in the four kinds of RULER.

After Hsieh et al., "RULER: What's the real context size of your long-context language models?", 2024,
arXiv:2404.06654, section 3.1, with drawn words as keys and filler from this machine, so that nothing is downloaded.
"""

from functools import partial
from random import Random
from typing import Any, NamedTuple

from hybridattn.evals.lm_eval.tasks.facts import distinct, number, word
from hybridattn.evals.lm_eval.tasks.grid import Cell, build


class Kind(NamedTuple):
    """How many keys there are, values of each, and how many of the keys are asked."""

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
    """One prompt. The first needle asked for stands at the depth, the others follow in even steps, round and round."""
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
        # A value named at random is one of the answers this often, and then it is one answer of all.
        "chance": 1 / len(needles),
    }


def listed(words: list[str]) -> str:
    """Words as in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def dataset(kind: str, **options: Any) -> dict[str, Any]:
    """The data of one of `KINDS`; `grid.build` says which options there are."""
    return build(f"niah {kind}", partial(row, kind=KINDS[kind]), **{**options, "loads": (1,)})
