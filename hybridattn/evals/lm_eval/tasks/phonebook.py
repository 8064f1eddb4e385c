"""The phone book task: as many lines ``name: number`` as fit the prompt, filler for the rest; it queries one name."""

from random import Random
from typing import Any

from hybridattn.evals.lm_eval.tasks.facts import name, number
from hybridattn.evals.lm_eval.tasks.grid import Cell, build
from hybridattn.evals.lm_eval.tasks.prompt import assemble, fit

ENTRY_TOKENS = 8  # start value for the tokens of an entry; a tokenizer gives more


def row(rng: Random, cell: Cell) -> dict[str, Any]:
    """Generate a row at least nine tenths of whose prompt are entries; ``load`` is their number."""
    book: dict[str, str] = {}

    def render(more: int, text: str = "") -> str:
        while len(book) < more + 1:  # at least one entry
            book[name(rng)] = number(rng, 7)
        names = list(book)[: more + 1]
        asked = names[round(cell.depth * more)]
        lines = "\n".join(f"{key}: {book[key]}" for key in names)
        return assemble(f"{text}\n{lines}", f"What is the number of {asked}?", f"{asked}:", cell.form)

    more, _ = fit(render, cell.count, cell.most * 9 // 10, cell.most, step_tokens=ENTRY_TOKENS)
    asked = list(book)[round(cell.depth * more)]
    return {
        "prompt": cell.fill(rng, lambda text: render(more, text)),
        "answers": [book[asked]],
        "load": more + 1,
        "chance": 1 / (more + 1),
    }


def dataset(**options: Any) -> dict[str, Any]:
    """Build the task's data set; options as in `grid.build`, except ``loads``."""
    return build("phonebook", row, **{**options, "loads": (1,)})
