import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridattn.evals.lm_eval.positions import bits_by_position, extrapolation


class Sure(nn.Module):
    """A model that gives the correct next token a probability of 1/2 in the first 40 positions and 1/8 later."""

    device = torch.device("cpu")

    def base_model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 8)
        logits[:, :40].scatter_(-1, ((input_ids[:, :40] + 1) % 8)[..., None], math.log(7))
        return SimpleNamespace(last_hidden_state=logits)

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()


TEXT = np.arange(2000) % 8


def test_bits_are_those_of_the_position():
    spans = bits_by_position(Sure(), TEXT, length=1500)
    assert [(s["first"], s["last"]) for s in spans] == [
        (0, 31),
        (32, 63),
        (64, 127),
        (128, 255),
        (256, 511),
        (512, 1023),
        (1024, 1499),
    ]
    expected = [1, (8 * 1 + 24 * 3) / 32, 3, 3, 3, 3, 3]
    assert [s["bits"] for s in spans] == pytest.approx(expected)
    assert spans[1]["tokens"] == 32


def test_windows_are_spread_over_the_text():
    """In a text of two halves, of which the model predicts one, bits are the mean over both."""
    text = np.concatenate((TEXT[:600], np.zeros(600, dtype=int)))
    (span,) = bits_by_position(Sure(), text, length=20, windows=50)
    assert span["tokens"] == 20 * 50
    assert 1.5 < span["bits"] < 3.5


def test_lengths_beyond_the_text_are_left_out():
    assert list(extrapolation(Sure(), TEXT, trained=300)) == ["300", "600", "1200"]


def test_too_short_a_text_is_named():
    with pytest.raises(ValueError, match=r"tokens: expected at least 2001 \(one window\), got 2000"):
        bits_by_position(Sure(), TEXT, length=2000)
