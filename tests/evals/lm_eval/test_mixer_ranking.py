"""Training rows of key-value pairs in text, and scores of `hybridattn eval` for models trained on them."""

import sys
from pathlib import Path
from random import Random

import pytest
import torch
from lm_eval.tasks._index import TaskIndex

from hybridattn.evals.lm_eval import mixer_ranking as ranking
from hybridattn.evals.lm_eval.tasks import TASKS, kv
from hybridattn.evals.lm_eval.tasks.facts import SYLLABLES
from hybridattn.evals.lm_eval.tasks.grid import Cell
from hybridattn.models.decoder import HybridAttnForCausalLM


def test_tokens_are_syllables_and_pairs_of_digits():
    tokens = ranking.tokenizer()
    assert len({*tokens.get_vocab().values()}) == len(tokens) == 2 + 256 + len(SYLLABLES) + 200
    assert [tokens.decode(token) for token in tokens("badiku: 4821\n").input_ids] == [
        *("ba", "di", "ku", ":", " 48", "21", "\n")
    ]
    text = "  if foo(12) >= 345:\n\treturn 'Grüße', \"\N{SNOWMAN}\"\n"
    assert tokens.decode(tokens(text).input_ids) == text


@pytest.mark.parametrize("load", ranking.LOADS)
def test_labels_are_the_values_of_all_pairs(load: int):
    tokens = ranking.tokenizer()
    rows = ranking.training_rows(tokens, Random(1), load)
    assert rows.tokens.shape[0] == len(rows.positions) == len(rows.labels) == ranking.BATCH
    assert rows.tokens.shape[1] <= ranking.LENGTH + ranking.LINE_TOKENS * load
    for row, positions, labels in zip(rows.tokens, rows.positions, rows.labels, strict=True):
        *context, _ = text = tokens.decode(row[row != ranking.PAD]).split("\n")
        asked = dict(line.split(": ") for line in text[-load:])
        assert len(asked) == load
        assert all(f"{key}: {value}" in context[:-load] + context for key, value in asked.items())
        values = [tokens.decode(pair) for pair in labels.view(load, 2)]
        assert sorted(value.strip() for value in values) == sorted(asked.values())
        assert torch.equal(row[positions + 1], labels)


def test_a_prompt_of_the_task_is_the_beginning_of_a_training_row():
    """A prompt has the form of a training row: filler with pairs, and a line that ends with a key."""
    tokens = ranking.tokenizer()
    cell = Cell(ranking.LENGTH, 0.5, 4, "once", lambda text: len(tokens(text).input_ids))
    prompt, text = kv.row(Random(3), cell)["prompt"], ranking.training_text(Random(3), cell)
    context = prompt.rpartition("\n")[0]
    assert text.startswith(context + "\n")
    assert prompt.removeprefix(context + "\n").removesuffix(":") in text.removeprefix(context)


def test_batches_come_in_rising_load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranking, "POOL", 1)
    batches = ranking.batches(ranking.tokenizer(), seed=0)
    loads = [next(batches).labels.shape[1] // 2 for _ in range(2 * len(ranking.LOADS))]
    assert loads == 2 * list(ranking.LOADS)


@pytest.mark.slow
def test_every_mix_is_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Two mixes are trained for two steps each; the command itself trains all mixes for minutes."""
    build = TaskIndex.build
    ours = staticmethod(lambda paths, **options: build([path for path in paths if Path(path) == TASKS], **options))
    monkeypatch.setattr(TaskIndex, "build", ours)
    monkeypatch.setattr(ranking, "POOL", 1)
    monkeypatch.setattr(ranking.score, "__kwdefaults__", {"rows_per_cell": 1})
    mixes = {name: (ranking.MIXERS[name][0], 2) for name in ("GLA", "sliding window")}
    monkeypatch.setattr(ranking, "MIXERS", mixes)
    monkeypatch.setattr(sys, "argv", ["mixer_ranking", "--out", str(tmp_path)])
    ranking.main()
    printed = capsys.readouterr().out
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-4:]]
    assert heads == ["mix", "4 pairs", "8 pairs", "16 pairs"]
    assert [row[0] for row in rows] == list(mixes)
    assert all(0 <= float(share) <= 1 for row in rows for share in row[1:])
    for name, (mixers, _) in mixes.items():
        model = HybridAttnForCausalLM.from_pretrained(tmp_path / name.replace(" ", "_") / "model")
        torch.manual_seed(0)
        fresh = ranking.build(mixers, model.config.vocab_size)
        assert model.config.mixers == mixers
        assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)
