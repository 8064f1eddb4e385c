"""Interpolated Witten-Bell n-gram models over bytes, as baselines for byte-level language models.

Let h be the context of k previous tokens, N(h) its count and D(h) the number of distinct tokens that follow it:

    P_k(w | h) = (count(h w) + D(h) P_{k-1}(w | h without its oldest token)) / (N(h) + D(h)).

P_k = P_{k-1} if N(h) = 0, and P_{-1} is uniform over the vocabulary. Source: Witten and Bell, 1991, method C, in the
interpolated form of Chen and Goodman, 1998, section 2.5.
"""

from dataclasses import dataclass

import numpy as np

VOCAB_SIZE = 257  # byte values and the separator
HIGHEST_ORDER = 6  # a context and its token must fit one int64 in base VOCAB_SIZE


@dataclass(frozen=True)
class Counts:
    """Counts of the n-grams of one order. Keys are sorted; a context of k tokens is k digits in base VOCAB_SIZE.

    Attributes:
        ngrams, ngram_counts: int64 ``[distinct n-grams]``, key (context * VOCAB_SIZE + token) and occurrences.
        contexts, totals, distinct: int64 ``[distinct contexts]``, key, N(h) and D(h).
    """

    ngrams: np.ndarray
    ngram_counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray


def count(tokens: np.ndarray, *, order: int) -> Counts:
    """Count the n-grams of one order: every token with the ``order`` tokens before it.

    Args:
        tokens: token ids below ``VOCAB_SIZE``, integers ``[time]``.
        order: number of context tokens, 0 to ``HIGHEST_ORDER``.

    Raises:
        ValueError: ``order`` out of range, or not more tokens than ``order``.
    """
    if not 0 <= order <= HIGHEST_ORDER:
        raise ValueError(f"order: expected 0 to {HIGHEST_ORDER}, got {order}")
    if len(tokens) <= order:
        raise ValueError(f"tokens: expected more than {order} (the order), got {len(tokens)}")
    positions = np.arange(order, len(tokens))
    tokens = tokens.astype(np.int64)
    keys = context_keys(tokens, positions, order) * VOCAB_SIZE + tokens[order:]
    ngrams, ngram_counts = np.unique(keys, return_counts=True)
    contexts, first, distinct = np.unique(ngrams // VOCAB_SIZE, return_index=True, return_counts=True)
    return Counts(ngrams, ngram_counts, contexts, np.add.reduceat(ngram_counts, first), distinct)


def context_keys(tokens: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """Encode the ``order`` tokens before each position as one int64, oldest token first; returns ``[positions]``."""
    keys = np.zeros(len(positions), np.int64)
    for distance in range(order, 0, -1):
        keys = keys * VOCAB_SIZE + tokens[positions - distance]
    return keys


def bits_per_token(models: list[Counts], tokens: np.ndarray, positions: np.ndarray) -> list[float]:
    """Compute the mean of -log2 P(token | previous tokens) at the given positions, for each order from 0.

    Args:
        models: the counts of orders 0, 1, 2, .., in this order.
        tokens: token ids ``[time]`` of the text to score.
        positions: indices into ``tokens`` ``[positions]``, each at least the highest order.

    Returns:
        Bits per token, one number per order.

    Raises:
        ValueError: no positions, or a position with too few tokens before it.
    """
    if len(positions) == 0 or positions.min() < len(models) - 1:
        raise ValueError(
            f"positions: expected at least one, each >= {len(models) - 1}, got {np.sort(positions)[:3]}, .."
        )
    tokens = tokens.astype(np.int64)
    probability = np.full(len(positions), 1 / VOCAB_SIZE)
    bits = []
    for order, seen in enumerate(models):
        context = context_keys(tokens, positions, order)
        total = look_up(seen.contexts, seen.totals, context)
        distinct = look_up(seen.contexts, seen.distinct, context)
        occurrences = look_up(seen.ngrams, seen.ngram_counts, context * VOCAB_SIZE + tokens[positions])
        interpolated = (occurrences + distinct * probability) / np.maximum(total + distinct, 1)
        probability = np.where(total > 0, interpolated, probability)
        bits.append(float(-np.log2(probability).mean()))
    return bits


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return ``values`` where the sorted ``keys`` equal ``wanted``, and 0 for keys that are absent."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
