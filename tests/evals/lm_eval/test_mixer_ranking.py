"""Models trained on key-value pairs in text, and what `hybridattn eval` makes of them."""

from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch
from lm_eval.tasks._index import TaskIndex

from hybridattn.evals.lm_eval.tasks import TASKS, kv
from hybridattn.evals.lm_eval.tasks.facts import SYLLABLES
from hybridattn.evals.lm_eval.tasks.grid import Cell
from hybridattn.evals.recall import order


def test_tokens_are_syllables_and_pairs_of_digits():
    tokens = order.tokenizer()
    assert len({*tokens.get_vocab().values()}) == len(tokens) == 2 + 256 + len(SYLLABLES) + 200
    assert [tokens.decode(token) for token in tokens("badiku: 4821\n").input_ids] == [
        *("ba", "di", "ku", ":", " 48", "21", "\n")
    ]
    text = "  if foo(12) >= 345:\n\treturn 'Grüße', \"\N{SNOWMAN}\"\n"
    assert tokens.decode(tokens(text).input_ids) == text


@pytest.mark.parametrize("load", order.LOADS)
def test_labels_are_the_values_of_all_pairs(load: int):
    tokens = order.tokenizer()
    rows = order.training_rows(tokens, Random(1), load)
    assert rows.tokens.shape[0] == len(rows.positions) == len(rows.labels) == order.BATCH
    assert rows.tokens.shape[1] <= order.LENGTH + order.LINE_TOKENS * load
    for row, positions, labels in zip(rows.tokens, rows.positions, rows.labels, strict=True):
        *context, _ = text = tokens.decode(row[row != order.PAD]).split("\n")
        asked = dict(line.split(": ") for line in text[-load:])
        assert len(asked) == load
        assert all(f"{key}: {value}" in context[:-load] + context for key, value in asked.items())
        values = [tokens.decode(pair) for pair in labels.view(load, 2)]
        assert sorted(value.strip() for value in values) == sorted(asked.values())
        assert torch.equal(row[positions + 1], labels)


def test_a_prompt_of_the_task_is_the_beginning_of_a_training_row():
    """The model sees the task as it was trained: filler, pairs, and a line that ends with a key."""
    tokens = order.tokenizer()
    cell = Cell(order.LENGTH, 0.5, 4, "once", lambda text: len(tokens(text).input_ids))
    prompt, text = kv.row(Random(3), cell)["prompt"], order.training_text(Random(3), cell)
    context = prompt.rpartition("\n")[0]
    assert text.startswith(context + "\n")
    assert prompt.removeprefix(context + "\n").removesuffix(":") in text.removeprefix(context)


def test_the_task_orders_mixers_as_the_literature_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Full attention and hybrids before BASED and GLA, these before a window that sees 16 tokens."""
    build = TaskIndex.build
    ours = staticmethod(lambda paths, **options: build([path for path in paths if Path(path) == TASKS], **options))
    monkeypatch.setattr(TaskIndex, "build", ours)
    shares = {}
    for mix in order.MIXERS:
        order.train(mix, tmp_path / mix / "model")
        by_load = order.score(tmp_path / mix / "model", tmp_path / mix / "report", rows_per_cell=4)
        assert list(by_load) == ["4", "8", "16"]
        shares[mix] = fmean(by_load.values())
    assert min(shares["full attention"], shares["hybrid"]) > 0.7, shares
    assert shares["full attention"] > max(shares["BASED"], shares["GLA"]), shares
    assert shares["hybrid"] > shares["GLA"], shares
    assert shares["BASED"] > shares["sliding window"] + 0.2, shares
    assert shares["GLA"] > shares["sliding window"] + 0.1, shares
    assert shares["sliding window"] < 0.15, shares
