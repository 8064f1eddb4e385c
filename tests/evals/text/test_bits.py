from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hybridattn.evals.text.bits import model_bits_per_byte, ngram_bits_per_byte, scored_windows
from hybridattn.training.byte_corpus import SEPARATOR, VOCAB_SIZE, encode


class Repeating(nn.Module):
    """A model that predicts a repetition of the last token with probability 1/2; other tokens share the rest."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        probability = torch.full((*input_ids.shape, VOCAB_SIZE), 0.5 / (VOCAB_SIZE - 1))
        return SimpleNamespace(logits=probability.scatter(2, input_ids[..., None], 0.5).log())


def test_windows_score_every_target_once_and_no_separator():
    text = encode([bytes(range(256)) * 3, b"other" * 100])
    windows = scored_windows(text, length=64, scored=32)
    assert np.array_equal(text[windows.places], windows.tokens)
    assert not windows.scored[:, :32].any()
    places = windows.places[:, 1:][windows.scored]
    assert len(np.unique(places)) == len(places)
    assert (text[places] != SEPARATOR).all()
    left_out = set(windows.places[:, 33:].ravel()) - set(places)
    assert all(text[i] == SEPARATOR for i in left_out)


def test_bits_of_a_known_model():
    text = np.array([1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4] * 20)
    windows = scored_windows(text, length=16, scored=8)
    repeats = [text[i] == text[i - 1] for i in windows.places[:, 1:][windows.scored]]
    expected = np.where(repeats, 1, 1 + np.log2(VOCAB_SIZE - 1)).mean()
    assert model_bits_per_byte(Repeating(), windows, batch=3) == pytest.approx(expected, rel=1e-5)


def test_ngrams_are_scored_where_the_model_is():
    text = encode([b"abcdefgh" * 100])
    windows = scored_windows(text, length=64, scored=32)
    bits = ngram_bits_per_byte(text, text, windows, orders=3)
    assert bits[0] == pytest.approx(3, abs=0.1)
    assert bits[2] < bits[1] < 0.2


def test_a_text_shorter_than_a_window_is_named():
    with pytest.raises(ValueError, match=r"tokens: expected at least 65 \(one window\), got 10"):
        scored_windows(np.zeros(10, np.int16), length=64, scored=32)
