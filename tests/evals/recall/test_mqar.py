from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridattn.evals.pareto.suite import load
from hybridattn.evals.recall import mqar, training_pool
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

OPTIONS = {name: entry["model"]["config"] for name, entry in load("cpu").models.items()}


class Lookup(nn.Module):
    """A model that predicts, for every token, the token after its first occurrence in the row: perfect recall."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int = mqar.VOCAB_SIZE):
        super().__init__()
        self.config, self.lm_head = SimpleNamespace(vocab_size=vocab_size), nn.Identity()

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        is_same = input_ids[:, :, None] == input_ids[:, None, :]
        after = input_ids.roll(-1, 1).gather(1, is_same.int().argmax(-1))
        return SimpleNamespace(last_hidden_state=F.one_hot(after, self.config.vocab_size).float())


@pytest.mark.parametrize("pairs", [1, 4, 32, 127])
def test_every_key_is_queried_once_with_its_value_as_label(pairs: int):
    tokens, positions, labels = mqar.rows(50, pairs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(positions, torch.arange(2 * pairs, 3 * pairs).expand(50, -1))
    assert tokens.shape == (50, 3 * pairs)
    assert labels.shape == (50, pairs)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        table = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == len(set(table.values())) == pairs
        assert all(0 < key < 128 <= value < 256 for key, value in table.items())
        assert sorted(row[2 * pairs :]) == sorted(table)
        assert [table[key] for key in row[2 * pairs :]] == answers


def test_queries_come_in_another_order_than_keys():
    tokens, _, _ = mqar.rows(50, 8, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize(("length", "pairs"), mqar.PUBLISHED_TEST)
@pytest.mark.parametrize("live_filler", [False, True])
def test_published_rows(length: int, pairs: int, live_filler: bool):
    """Rows have the pairs, then every key at a later even position with its value as label, and filler without keys."""
    generator = torch.Generator().manual_seed(0)
    drawn = mqar.published_rows(20, length, pairs, generator=generator, vocab_size=2200, live_filler=live_filler)
    assert drawn.tokens.shape == (20, length)
    named = 0
    for row, places, labels in zip(*(x.tolist() for x in drawn), strict=True):
        table = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == len(set(table.values())) == pairs
        assert all(0 < key < 1100 <= value < 2200 for key, value in table.items())
        assert all(place >= 2 * pairs and place % 2 == 0 for place in places)
        assert sorted(row[place] for place in places) == sorted(table)
        assert [table[row[place]] for place in places] == labels
        named += sum(row[t] in table for t in set(range(2 * pairs, length)) - set(places))
    assert live_filler or named == 0
    if live_filler and pairs >= 32:
        assert named > 0


@pytest.mark.slow
def test_published_queries_come_soon():
    """The i-th position has the weight i^-0.99, so the first one has about a fifth of the total."""
    generator = torch.Generator().manual_seed(0)
    places = (mqar.published_rows(4000, 200, 1, generator=generator).positions[:, 0] - 2) // 2
    weights = torch.arange(1, 100).double() ** -0.99
    shares = weights / weights.sum()
    assert (places == 0).float().mean().item() == pytest.approx(shares[0].item(), rel=0.1)
    assert (places >= 50).float().mean().item() == pytest.approx(shares[50:].sum().item(), rel=0.15)


def test_published_training_is_the_same_rows_in_every_epoch():
    slices = {(16, 2): 20, (24, 3): 10}
    batches = mqar.published_batches(3, batch=5, slices=slices, vocab_size=64)
    epochs = [[next(batches) for _ in range(6)] for _ in range(2)]
    texts = [[str(rows.tokens.tolist()) for rows in epoch] for epoch in epochs]
    assert sorted(texts[0]) == sorted(texts[1])
    assert len(set(texts[0])) == 6
    assert texts[0] != texts[1]
    again = mqar.published_batches(3, batch=5, slices=slices, vocab_size=64)
    assert torch.equal(next(again).tokens, epochs[0][0].tokens)


def test_published_recall_of_a_lookup(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mqar, "PUBLISHED_TEST", mqar.PUBLISHED_TEST[:4])
    assert mqar.published_recall(Lookup(512), count=7, batch=3) == dict.fromkeys(mqar.PUBLISHED_TEST, 1)


@pytest.mark.parametrize(
    ("length", "pairs", "named"),
    [
        (15, 2, "length: expected an even number of at least 8"),
        (6, 2, "length: .*, got 6"),
        (8, 0, "pairs: expected 1 to 4095"),
    ],
)
def test_impossible_published_rows_are_refused(length: int, pairs: int, named: str):
    with pytest.raises(ValueError, match=named):
        mqar.published_rows(1, length, pairs, generator=torch.Generator())


def test_logits_at_queries_are_those_of_the_whole_model():
    model = HybridAttnForCausalLM(HybridAttnConfig(**OPTIONS["attention-first hybrid"])).eval()
    batch = mqar.rows(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=batch.tokens).logits[:, -8:]
        assert torch.allclose(mqar.query_logits(model, batch), expected, atol=1e-5)


# A hybrid learns to recall; a window of 16 tokens, trained as long, finds no pair that is further away.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "least", "most"), [("attention-first hybrid", 0.95, 1), ("sliding window 16", 0.03, 0.15)]
)
def test_recall_of_32_pairs(entry: str, least: float, most: float):
    model = HybridAttnForCausalLM(HybridAttnConfig(**OPTIONS[entry]))
    mqar.train(model, steps=300)
    assert least <= mqar.recall(model, 32) <= most


@pytest.mark.slow
def test_parallel_training_is_training():
    jobs = [training_pool.Job(options, 3, seed=1, looks=2) for options in list(OPTIONS.values())[:3]]
    done: dict[int, training_pool.Trained] = {}
    trained = training_pool.train_all(jobs, done.__setitem__)
    assert [done[i].recall for i in range(3)] == [result.recall for result in trained]
    for job, (weights, recall, curve, seconds) in zip(jobs, trained, strict=True):
        torch.manual_seed(1)
        model = HybridAttnForCausalLM(HybridAttnConfig(**job.options))
        mqar.train(model, steps=3, seed=1)
        for name, parameter in model.state_dict().items():
            assert torch.allclose(torch.from_numpy(weights[name]), parameter, atol=1e-5), name
        assert recall == {pairs: mqar.recall(model, pairs) for pairs in mqar.TEST_PAIRS}
        assert [steps for steps, _ in curve] == [2, 3]
        assert curve[-1][1] == recall[32]
        assert seconds > 0


def test_the_published_procedure_trains_and_scores_its_slices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mqar, "PUBLISHED_TEST", mqar.PUBLISHED_TEST[:5])
    monkeypatch.setattr(mqar.published_recall, "__kwdefaults__", {"count": 4, "batch": 4})
    small = {(64, 4): 8}
    batches = partial(mqar.published_batches, batch=4, slices=small)
    monkeypatch.setitem(mqar.PROCEDURES, "published", mqar.PROCEDURES["published"]._replace(batches=batches))
    found = training_pool.train_one(training_pool.Job(OPTIONS["GLA"], 3, seed=0, looks=2, procedure="published"))
    assert list(found.recall) == [4, 8, 16, 32, 64]
    assert [steps for steps, _ in found.curve] == [2, 3]


def test_no_jobs_give_no_results():
    assert training_pool.train_all([]) == []


@pytest.mark.slow
def test_a_failing_worker_fails_the_run():
    with pytest.raises(Exception, match=r"mixers\[0\]: expected one of"):
        training_pool.train_all([training_pool.Job({"mixers": ["nonsense"]}, 3, seed=0)])


def test_test_rows_are_not_training_rows():
    seeds = [1000 + seed for seed in range(100)]  # the seeds of training
    assert mqar.TEST_SEED not in seeds
