"""A phone book: as many lines ``name: number`` as the length holds, one name is asked; real text fills the rest."""

from random import Random
from typing import Any

from hybridattn.evals.lm_eval.tasks.facts import name, number
from hybridattn.evals.lm_eval.tasks.grid import Cell, build
from hybridattn.evals.lm_eval.tasks.prompt import assemble, fit

ENTRY_TOKENS = 8  # fewer than a tokenizer makes of an entry: where the search for their number starts


def row(rng: Random, cell: Cell) -> dict[str, Any]:
    """One prompt, nine tenths of it or more entries; ``load`` is their number."""
    book: dict[str, str] = {}

    def render(more: int, text: str = "") -> str:
        while len(book) < more + 1:  # never empty
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
    """The task's data; `grid.build` says which options there are."""
    return build("phonebook", row, **{**options, "loads": (1,)})
