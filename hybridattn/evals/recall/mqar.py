"""Multi-query associative recall (MQAR): data, training and scoring, as published and as a recipe for CPUs.

In the CPU recipe, which trains a model in a minute, the N keys follow N key-value pairs in random order. At each of
these queries the model must predict the key's value:

    k1 v1 k2 v2 ... kN vN  q1 q2 ... qN        3N tokens, a label at every query

Every row draws its keys without replacement from 1 .. V/2 - 1 and its values from V/2 .. V - 1. A row queries all N
pairs, so it has N labels. Training cycles through growing N; without this, models learn large N late.

Source: Arora et al., "Zoology", 2023, arXiv:2312.04927, section 4 and appendix on MQAR. The published rows
(``published_rows``) are longer: filler separates the queries, most of which come soon after the pairs.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

VOCAB_SIZE = 256
TRAIN_PAIRS = (4, 8, 16, 32)
TEST_PAIRS = (8, 16, 32)
TEST_ROWS = 256
TEST_SEED = 7  # training uses other seeds

PUBLISHED_VOCAB_SIZE = 8192
PUBLISHED_TRAIN = {(64, 4): 100_000, (128, 8): 20_000, (256, 16): 20_000, (256, 32): 20_000, (256, 64): 20_000}
"""Training rows by (tokens, pairs); 32 epochs in batches of 256."""
PUBLISHED_TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
"""Test slices (tokens, pairs), a thousand rows each."""
PUBLISHED_RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
"""Learning rates of the published search; the best one counts."""


class Rows(NamedTuple):
    """MQAR rows.

    Attributes:
        tokens: int64 ``[rows, T]``.
        positions: int64 ``[rows, N]``, positions of the queries.
        labels: int64 ``[rows, N]``, values of the queried keys.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor


def rows(count: int, pairs: int, *, generator: torch.Generator, vocab_size: int = VOCAB_SIZE) -> Rows:
    """Draw MQAR rows of the CPU recipe.

    Args:
        count: number of rows.
        pairs: key-value pairs per row, N.
        generator: source of randomness.
        vocab_size: V; keys and values use half each, token 0 is not used.

    Raises:
        ValueError: ``pairs`` is not in 1 .. V/2 - 1.
    """
    half = vocab_size // 2
    if not 1 <= pairs < half:
        raise ValueError(f"pairs: expected 1 to {half - 1} for vocab_size={vocab_size}, got {pairs}")
    keys = distinct(count, half - 1, pairs, generator) + 1
    values = distinct(count, vocab_size - half, pairs, generator) + half
    order = distinct(count, pairs, pairs, generator)
    context = torch.stack([keys, values], dim=-1).flatten(1)
    tokens = torch.cat([context, keys.gather(1, order)], dim=1)
    positions = torch.arange(2 * pairs, 3 * pairs).expand(count, pairs)
    return Rows(tokens, positions, values.gather(1, order))


def published_rows(
    count: int,
    length: int,
    pairs: int,
    *,
    generator: torch.Generator,
    vocab_size: int = PUBLISHED_VOCAB_SIZE,
    power: float = 0.01,
    live_filler: bool = False,
) -> Rows:
    """Draw rows of the published form: the pairs, then every key once at a later even position, and filler.

    Args:
        count, pairs, generator, vocab_size: as in ``rows``.
        length: tokens of a row, even and at least 4 * pairs.
        power: a in the weight i^(a - 1) with which the i-th position after the pairs is drawn, without replacement.
        live_filler: draw filler from the whole vocabulary, as the published code does. Filler may then contain keys of
            the row, at positions without a label; by default it contains none.

    Raises:
        ValueError: a row that is too short, or too many pairs for the vocabulary.
    """
    half, context = vocab_size // 2, 2 * pairs
    if not 1 <= pairs < half:
        raise ValueError(f"pairs: expected 1 to {half - 1} for vocab_size={vocab_size}, got {pairs}")
    if length % 2 or length < 2 * context:
        raise ValueError(f"length: expected an even number of at least {2 * context} for {pairs} pairs, got {length}")
    keys = distinct(count, half - 1, pairs, generator) + 1
    values = distinct(count, vocab_size - half, pairs, generator) + half
    places = torch.arange(1, (length - context) // 2 + 1, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(places.expand(count, -1), pairs, generator=generator)
    positions = context + 2 * gaps
    tokens = torch.randint(vocab_size, (count, length), generator=generator)
    if not live_filler:
        live = torch.zeros(count, vocab_size, dtype=torch.bool).scatter_(1, keys, True)
        while (named := live.gather(1, tokens)).any():
            tokens[named] = torch.randint(vocab_size, (int(named.sum()),), generator=generator)
    tokens[:, :context] = torch.stack([keys, values], dim=-1).flatten(1)
    return Rows(tokens.scatter_(1, positions, keys), positions, values)


def distinct(count: int, below: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw integers below ``below``, distinct within each row, int64 ``[count, size]``."""
    return torch.rand(count, below, generator=generator).argsort(dim=1)[:, :size]


def query_logits(model: PreTrainedModel, batch: Rows) -> Tensor:
    """Compute the logits ``[rows, N, V]`` at the queries only, since the head costs as much as a layer."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(hidden))[:, None], batch.positions])


@torch.inference_mode()
def recall(model: PreTrainedModel, pairs: int, *, count: int = TEST_ROWS) -> float:
    """Compute the accuracy on ``count`` held-out rows of ``pairs`` pairs; the answer is the argmax of the logits."""
    batch = rows(count, pairs, generator=torch.Generator().manual_seed(TEST_SEED), vocab_size=model.config.vocab_size)
    return accuracy(model, batch)


@torch.inference_mode()
def accuracy(model: PreTrainedModel, batch: Rows) -> float:
    """Compute the share of queries whose label is the argmax of the logits."""
    batch = Rows(*(x.to(model.device) for x in batch))
    return (query_logits(model, batch).argmax(-1) == batch.labels).float().mean().item()


def published_recall(model: PreTrainedModel, *, count: int = 1000, batch: int = 50) -> dict[tuple[int, int], float]:
    """Compute the accuracy on ``count`` rows of each published test slice, by (tokens, pairs)."""
    scores = {}
    for length, pairs in PUBLISHED_TEST:
        generator = torch.Generator().manual_seed(TEST_SEED)
        sizes = [min(batch, count - first) for first in range(0, count, batch)]
        draw = partial(published_rows, generator=generator, vocab_size=model.config.vocab_size)
        scores[length, pairs] = sum(n * accuracy(model, draw(n, length, pairs)) for n in sizes) / count
    return scores


def recipe_batches(
    seed: int = 0, *, pairs: Sequence[int] = TRAIN_PAIRS, batch: int = 64, vocab_size: int = VOCAB_SIZE
) -> Iterator[Rows]:
    """Yield the CPU recipe's training batches endlessly: ``batch`` rows of ``pairs[0]`` pairs, of ``pairs[1]``, .."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        for n in pairs:
            yield rows(batch, n, generator=generator, vocab_size=vocab_size)


def published_batches(
    seed: int = 0,
    *,
    batch: int = 256,
    slices: dict[tuple[int, int], int] | None = None,
    vocab_size: int = PUBLISHED_VOCAB_SIZE,
) -> Iterator[Rows]:
    """Yield the published training batches endlessly: every epoch has the same rows in another order of batches.

    Args:
        seed: seed of rows and order.
        batch: rows per step, all from one slice.
        slices: rows by (tokens, pairs), ``PUBLISHED_TRAIN`` by default; an incomplete last batch is dropped.
        vocab_size: V.
    """
    slices = PUBLISHED_TRAIN if slices is None else slices
    batches = [(*shape, i) for shape, count in slices.items() for i in range(count // batch)]
    order = torch.Generator().manual_seed(1000 + seed)
    while True:
        for place in torch.randperm(len(batches), generator=order).tolist():
            length, pairs, number = batches[place]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {length} {pairs} {number}".encode()))
            yield published_rows(batch, length, pairs, generator=generator, vocab_size=vocab_size)


def train(
    model: PreTrainedModel,
    *,
    steps: int,
    seed: int = 0,
    batches: Iterable[Rows] | None = None,
    rate: float = 1e-2,
    warmup: int = 50,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a model on MQAR: AdamW (weight decay 0.1, clip 1), linear warm-up times a cosine over ``steps``.

    Args:
        model: a causal language model with ``model`` (the base) and ``lm_head``; in evaluation mode afterwards.
        steps: number of optimiser steps.
        seed: seed of the CPU recipe's rows, if ``batches`` is None.
        batches: the rows of each step.
        rate: peak learning rate.
        warmup: steps of linear warm-up.
        on_step: called after every step with the number of steps done.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    batches = recipe_batches(seed, vocab_size=model.config.vocab_size) if batches is None else batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step, drawn in zip(range(steps), batches, strict=False):
        drawn = Rows(*(x.to(model.device) for x in drawn))
        loss = F.cross_entropy(query_logits(model, drawn).flatten(0, 1), drawn.labels.flatten())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss: expected a finite value, got {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        on_step(step + 1)
    model.eval()


class Procedure(NamedTuple):
    """Functions that generate training data and score a model.

    Attributes:
        batches: ``(seed, vocab_size=..) -> Iterator[Rows]``, endless.
        recall: recall of a trained model by number of pairs.
        curve_pairs: the number of pairs, a key of ``recall``, of learning curves.
        curve_recall: recall at ``curve_pairs`` during training, on fewer rows.
    """

    batches: Callable[..., Iterator[Rows]]
    recall: Callable[[PreTrainedModel], dict[int, float]]
    curve_pairs: int
    curve_recall: Callable[[PreTrainedModel], float]


def _recipe_recall(model: PreTrainedModel) -> dict[int, float]:
    return {pairs: recall(model, pairs) for pairs in TEST_PAIRS}


def _published_recall(model: PreTrainedModel) -> dict[int, float]:
    return {pairs: score for (_, pairs), score in published_recall(model).items()}


def _published_curve_recall(model: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(TEST_SEED)
    return accuracy(model, published_rows(100, 256, 64, generator=generator, vocab_size=model.config.vocab_size))


PROCEDURES = {
    "recipe": Procedure(recipe_batches, _recipe_recall, 32, partial(recall, pairs=32, count=64)),
    "published": Procedure(published_batches, _published_recall, 64, _published_curve_recall),
}
"""By name, the CPU recipe and the published procedure."""
