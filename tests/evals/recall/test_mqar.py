from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridattn.evals.recall import mqar, parallel, suite
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM


class Lookup(nn.Module):
    """Names, at every token, what followed its first occurrence in the row: it recalls all."""

    config = SimpleNamespace(vocab_size=mqar.VOCAB_SIZE)
    lm_head = nn.Identity()

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        is_same = input_ids[:, :, None] == input_ids[:, None, :]
        after = input_ids.roll(-1, 1).gather(1, is_same.int().argmax(-1))
        return SimpleNamespace(last_hidden_state=F.one_hot(after, mqar.VOCAB_SIZE).float())


@pytest.mark.parametrize("pairs", [1, 4, 32, 127])
def test_every_key_is_asked_once_and_its_value_is_the_label(pairs: int):
    tokens, labels = mqar.rows(50, pairs, generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (50, 3 * pairs)
    assert labels.shape == (50, pairs)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        table = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == len(set(table.values())) == pairs
        assert all(0 < key < 128 <= value < 256 for key, value in table.items())
        assert sorted(row[2 * pairs :]) == sorted(table)
        assert [table[key] for key in row[2 * pairs :]] == answers


def test_queries_come_in_another_order_than_keys():
    tokens, _ = mqar.rows(50, 8, generator=torch.Generator().manual_seed(0))
    assert (tokens[:, 16:] != tokens[:, 0:16:2]).any(1).float().mean() > 0.9


def test_rows_depend_on_the_generator_alone():
    first, same, other = (mqar.rows(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_too_many_pairs_are_named():
    with pytest.raises(ValueError, match="pairs: expected 1 to 127 for vocab_size=256, got 128"):
        mqar.rows(1, 128, generator=torch.Generator())


@pytest.mark.parametrize("pairs", mqar.TEST_PAIRS)
def test_a_lookup_recalls_all(pairs: int):
    assert mqar.recall(Lookup(), pairs) == 1


def test_logits_at_queries_are_those_of_the_whole_model():
    options = suite.model_options(suite.ENTRIES["attention-first hybrid"])
    model = HybridAttnForCausalLM(HybridAttnConfig(**options)).eval()
    batch = mqar.rows(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=batch.tokens).logits[:, -8:]
        assert torch.allclose(mqar.query_logits(model, batch), expected, atol=1e-5)


# What each mixer can and cannot do, after training long enough to tell.
@pytest.mark.parametrize(
    ("entry", "steps", "least", "most"),
    [
        ("softmax attention", 300, 0.95, 1),
        ("attention-first hybrid", 300, 0.95, 1),
        ("BASED, d' = 8", 400, 0.9, 1),
        ("linear attention", 300, 0.03, 0.6),
        ("sliding window 16", 300, 0.03, 0.15),
    ],
)
def test_recall_of_32_pairs(entry: str, steps: int, least: float, most: float):
    model = HybridAttnForCausalLM(HybridAttnConfig(**suite.model_options(suite.ENTRIES[entry])))
    mqar.train(model, steps=steps)
    assert least <= mqar.recall(model, 32) <= most


def test_parallel_training_is_training():
    jobs = [parallel.Job(suite.model_options(suite.ENTRIES[label]), 3, seed=1) for label in list(suite.ENTRIES)[:3]]
    trained = parallel.train_all(jobs)
    for job, weights in zip(jobs, trained, strict=True):
        torch.manual_seed(1)
        model = HybridAttnForCausalLM(HybridAttnConfig(**job.options))
        mqar.train(model, steps=3, seed=1)
        for name, parameter in model.state_dict().items():
            assert torch.allclose(torch.from_numpy(weights[name]), parameter, atol=1e-5), name


def test_a_failing_worker_fails_the_run():
    with pytest.raises(Exception, match="mixers: expected names from"):
        parallel.train_all([parallel.Job({"mixers": ["nonsense"]}, 3, seed=0)])


def test_a_cache_larger_than_the_formula_fails(monkeypatch: pytest.MonkeyPatch):
    model = HybridAttnForCausalLM(HybridAttnConfig(**suite.model_options(suite.ENTRIES["GLA"]))).eval()
    honest = suite.check_state(model, 2, 10)
    assert honest["formula"] == honest["allocated"] > 2 * 32 * 64 * 4
    monkeypatch.setattr(suite, "allocated_bytes", lambda cache: honest["formula"] + 4)
    with pytest.raises(RuntimeError, match=f"expected {honest['formula']} bytes by formula"):
        suite.check_state(model, 2, 10)


def test_test_rows_are_not_training_rows():
    seeds = [1000 + seed for seed in range(100)]  # of train
    assert mqar.TEST_SEED not in seeds
