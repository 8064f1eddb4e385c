"""Build a task's data set from a row generator: rows for every length, depth and load, in the model's own tokens.

lm-eval calls a task's ``custom_dataset`` with the values of ``--model_args`` and ``--metadata``. The tokenizer is
therefore the model's, and users can set arguments of `build`, as in ``--metadata '{"max_seq_lengths": [8192]}'``.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

from hybridattn.evals.lm_eval.tasks import filler
from hybridattn.evals.lm_eval.tasks.prompt import SLACK, DoesNotFitError, assemble, fit, place

LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS_PER_CELL = 8
ANSWER_TOKENS = 48  # max_gen_toks of the tasks; part of the length, so that prompts are shorter by it


class Cell(NamedTuple):
    """The parameters that the rows of one cell share.

    Attributes:
        length: tokens of prompt and answer together.
        depth: relative position of the queried fact, 0 (first) to 1 (last).
        load: number of facts, for tasks in which it varies.
        form: one of `prompt.FORMS`.
        count: function that returns the number of tokens of a text.
    """

    length: int
    depth: float
    load: int
    form: str
    count: Callable[[str], int]

    @property
    def most(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.length - ANSWER_TOKENS

    @property
    def least(self) -> int:
        """Minimum number of tokens of a prompt."""
        return math.ceil(self.length * (1 - SLACK)) - ANSWER_TOKENS

    def fill(self, rng: Random, render: Callable[[str], str]) -> str:
        """Return a prompt of the cell's length; ``render`` inserts the facts into an excerpt of filler."""
        start = filler.line_start(rng.random())
        return fit(lambda size: render(filler.excerpt(start, size)), self.count, self.least, self.most)[1]

    def fill_between(self, rng: Random, facts: Sequence[tuple[float, str]], question: str, cloze: str) -> str:
        """Return a prompt of the cell's length, with each fact at its depth between lines of filler."""
        return self.fill(rng, lambda text: assemble(place(text, facts), question, cloze, self.form))


def build(
    task: str,
    row: Callable[[Random, Cell], dict[str, Any]],
    *,
    max_seq_lengths: Sequence[int] | int | None = None,
    loads: Sequence[int] = (1,),
    depths: Sequence[float] = DEPTHS,
    rows_per_cell: int = ROWS_PER_CELL,
    seed: int = 0,
    form: str = "once",
    max_length: int | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Build a task's data set, the split ``test``, in the form that lm-eval expects.

    A row depends only on task, seed, length, depth, load and row number, and on tokenizer and filler. All forms of a
    task use the same facts. Rows of all cells alternate, in random order, so that ``--limit`` selects from all lengths.
    A load is skipped for a length that cannot hold its facts.

    Args:
        task: the generator's name.
        row: function that generates one row of a cell: ``prompt``; ``answers``, which are all required; ``load``; and
            ``chance``, the expected score of answering with a random value of the context.
        max_seq_lengths: tokens of prompt and answer together; `LENGTHS` up to ``max_length`` if None.
        loads: numbers of facts, for tasks in which it varies.
        depths: relative positions of the queried fact, 0 to 1.
        rows_per_cell: number of rows for every length, depth and load.
        seed: random seed.
        form: one of `prompt.FORMS`.
        max_length: maximum input length of the model, in tokens.
        tokenizer: folder or name of the tokenizer; ``pretrained`` if None.
        pretrained: folder or name of the model.
        rest: other metadata; ``add_bos_token`` and ``trust_remote_code`` have lm-eval's meaning.

    Raises:
        ValueError: a bad argument, no tokenizer, or a length that is too short for every load.
    """
    from datasets import Dataset

    lengths = check_lengths(max_seq_lengths, max_length)
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths: expected numbers from 0 to 1, got {list(depths)}")
    count = counter(tokenizer or pretrained, bool(rest.get("trust_remote_code")), rest.get("add_bos_token"))
    cells = [Cell(length, depth, load, form, count) for length in lengths for load in loads for depth in depths]
    made: dict[tuple[int, int], list[list[dict[str, Any]]]] = {}
    for cell in cells:
        made.setdefault((cell.length, cell.load), []).append(cell_rows(task, row, cell, rows_per_cell, seed))
    complete = [rows for group in made.values() if all(group) for rows in group]
    for length in lengths:
        if not any(rows[0]["length"] == length for rows in complete):
            raise ValueError(f"max_seq_lengths: expected lengths that hold the facts of {task} ({form}), got {length}")
    Random(seed).shuffle(complete)
    return {"test": Dataset.from_list([rows[i] for i in range(rows_per_cell) for rows in complete])}


def cell_rows(
    task: str, row: Callable[[Random, Cell], dict[str, Any]], cell: Cell, rows: int, seed: int
) -> list[dict[str, Any]]:
    """Generate the rows of a cell; an empty list if the facts of one of them do not fit."""
    made = []
    for i in range(rows):
        rng = Random(f"{task} {seed} {cell.length} {cell.depth} {cell.load} {i}")
        try:
            drawn = row(rng, cell)
        except DoesNotFitError:
            return []
        tokens = cell.count(drawn["prompt"])
        made.append({"length": cell.length, "depth": float(cell.depth), "tokens": tokens, **drawn})
    return made


def check_lengths(wanted: Sequence[int] | int | None, max_length: int | None) -> list[int]:
    """Return the given lengths, or by default those of `LENGTHS` up to the model's maximum.

    Raises:
        ValueError: there are no lengths, or one is not an integer above `ANSWER_TOKENS`.
    """
    if wanted is None:
        lengths = [length for length in LENGTHS if max_length is None or length <= max_length]
    else:
        lengths = [wanted] if isinstance(wanted, int) else list(wanted)
    if not lengths or not all(isinstance(length, int) and length > ANSWER_TOKENS for length in lengths):
        raise ValueError(
            f"max_seq_lengths: expected integers above {ANSWER_TOKENS} (default: {list(LENGTHS)} up to the model's "
            f"max_length), got {wanted} with max_length={max_length}"
        )
    return lengths


@cache
def counter(tokenizer: str | None, trust_remote_code: bool, add_bos_token: bool | None) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text as lm-eval will encode it.

    Raises:
        ValueError: ``tokenizer`` is not a string.
    """
    if not isinstance(tokenizer, str):
        raise ValueError(
            f"tokenizer: expected a folder or name, in --model_args or --metadata as tokenizer or pretrained, "
            f"got {tokenizer!r}"
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    special = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
    return partial(count_tokens, loaded, special)


def count_tokens(tokenizer: Any, special: dict[str, bool], text: str) -> int:
    """Return the number of tokens of a text, including special tokens that the tokenizer adds."""
    return len(tokenizer(text, verbose=False, **special).input_ids)
