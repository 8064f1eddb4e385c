"""Multi-query associative recall (MQAR), in the form that a CPU trains in a minute.

N key-value pairs are followed by the N keys in random order; at each of these the model must name the key's value:

    k1 v1 k2 v2 ... kN vN  q1 q2 ... qN        3N tokens, a label at every query

Keys are drawn without replacement from 1 .. V/2 - 1, values likewise from V/2 .. V - 1, anew in every row. All N pairs
are asked, so every row supervises N look-ups; training cycles through growing N, without which large N is learnt late.
After Arora et al., "Zoology", 2023, arXiv:2312.04927, section 4 and appendix on MQAR, whose rows also hold filler.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

VOCAB_SIZE = 256
TRAIN_PAIRS = (4, 8, 16, 32)
TEST_PAIRS = (8, 16, 32)
TEST_ROWS = 256
TEST_SEED = 7  # training draws from other seeds


class Rows(NamedTuple):
    """MQAR rows: ``tokens`` int64 ``[rows, 3N]`` and ``labels`` int64 ``[rows, N]``, those of the last N positions."""

    tokens: Tensor
    labels: Tensor


def rows(count: int, pairs: int, *, generator: torch.Generator, vocab_size: int = VOCAB_SIZE) -> Rows:
    """Draw MQAR rows.

    Args:
        count: number of rows.
        pairs: key-value pairs per row, N.
        generator: source of randomness.
        vocab_size: V; keys and values take half each, token 0 is not used.

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
    return Rows(torch.cat([context, keys.gather(1, order)], dim=1), values.gather(1, order))


def distinct(count: int, below: int, size: int, generator: torch.Generator) -> Tensor:
    """Integers below ``below``, distinct within each row, int64 ``[count, size]``."""
    return torch.rand(count, below, generator=generator).argsort(dim=1)[:, :size]


def query_logits(model: PreTrainedModel, batch: Rows) -> Tensor:
    """Logits at the query positions, ``[rows, N, V]``: gathered before the head, which costs as much as a layer."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, -batch.labels.shape[1] :])


@torch.inference_mode()
def recall(model: PreTrainedModel, pairs: int, *, count: int = TEST_ROWS) -> float:
    """Share of queries answered right on ``count`` held-out rows of ``pairs`` pairs, greedily over the vocabulary."""
    batch = rows(count, pairs, generator=torch.Generator().manual_seed(TEST_SEED), vocab_size=model.config.vocab_size)
    return (query_logits(model, batch).argmax(-1) == batch.labels).float().mean().item()


def train(
    model: PreTrainedModel,
    *,
    steps: int,
    seed: int = 0,
    pairs: Sequence[int] = TRAIN_PAIRS,
    batch: int = 64,
    rate: float = 1e-2,
    warmup: int = 50,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a model on MQAR: AdamW (weight decay 0.1, clip 1), linear warm-up times a cosine over ``steps``.

    Args:
        model: a causal language model with ``model`` (the base) and ``lm_head``; left in evaluation mode.
        steps: optimiser steps.
        seed: of the rows.
        pairs: N of the successive steps, repeated.
        batch: rows per step.
        rate: peak learning rate.
        warmup: steps over which the rate rises.
        on_step: called with the number of steps done.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step in range(steps):
        drawn = rows(batch, pairs[step % len(pairs)], generator=generator, vocab_size=model.config.vocab_size)
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
