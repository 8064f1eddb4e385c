from collections import Counter
from math import log2

import numpy as np
import pytest

from hybridattn.training import ngram

TRAIN = np.frombuffer(b"abracadabra, a cadabra! abra abra: " * 3, np.uint8)
TEST = np.frombuffer(b"a cadabra, abrakadabra? zabra", np.uint8)


def probability(history: list[int], token: int, order: int) -> float:
    """Compute P_order(token | history) by recursion, as defined."""
    if order < 0:
        return 1 / ngram.VOCAB_SIZE
    context = history[len(history) - order :]
    following = Counter(int(TRAIN[i]) for i in range(order, len(TRAIN)) if TRAIN[i - order : i].tolist() == context)
    below = probability(history, token, order - 1)
    if not following:
        return below
    return (following[token] + len(following) * below) / (following.total() + len(following))


def test_bits_are_those_of_the_definition():
    models = [ngram.count(TRAIN, order=order) for order in range(5)]
    positions = np.arange(4, len(TEST))
    bits = ngram.bits_per_token(models, TEST, positions)
    for order in range(5):
        each = [-log2(probability(TEST[:i].tolist(), int(TEST[i]), order)) for i in positions]
        assert bits[order] == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("order", range(4))
def test_probabilities_sum_to_one(order: int):
    models = [ngram.count(TRAIN, order=k) for k in range(order + 1)]
    history = TEST[:6]
    total = 0.0
    for token in range(ngram.VOCAB_SIZE):
        text = np.append(history.astype(np.int64), token)
        total += 2 ** -ngram.bits_per_token(models, text, np.array([6]))[order]
    assert total == pytest.approx(1, rel=1e-12)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="order: expected 0 to 6, got 7"):
        ngram.count(TRAIN, order=7)
    with pytest.raises(ValueError, match=r"tokens: expected more than 3 \(the order\), got 3"):
        ngram.count(TRAIN[:3], order=3)
    models = [ngram.count(TRAIN, order=k) for k in range(3)]
    for positions, given in ((np.array([5, 1]), r"\[1 5\]"), (np.array([], int), r"\[\]")):
        with pytest.raises(ValueError, match=f"positions: expected at least one, each >= 2, got {given}"):
            ngram.bits_per_token(models, TEST, positions)
