"""Published slopes; constants stay fp32 when a module is cast, are not saved, and survive the meta device."""

import math

import pytest
import torch
from torch import nn

from hybridattn.layers import LightningAttention, Retention, SoftmaxAttention, decay_slopes
from hybridattn.layers.slopes import Slopes


def test_retnet_decays():
    decays = [math.exp(-slope) for slope in decay_slopes("retnet", 4)]
    assert decays == pytest.approx([31 / 32, 63 / 64, 127 / 128, 255 / 256], rel=1e-12)


def test_alibi_slopes():
    assert decay_slopes("alibi", 8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert decay_slopes("alibi", 4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]


def test_transnormer_slopes_shrink_with_the_layer():
    assert decay_slopes("transnormer", 4, 0, 5) == pytest.approx([2, 4, 6, 8])
    assert decay_slopes("transnormer", 4, 1, 5) == pytest.approx([1.6, 3.2, 4.8, 6.4])
    assert decay_slopes("transnormer", 4, 4, 5) == pytest.approx([0.4, 0.8, 1.2, 1.6])


def test_layers_have_their_papers_slopes():
    assert Retention(16, num_heads=2).slopes.numbers == decay_slopes("retnet", 2)
    layer = LightningAttention(16, num_heads=2, layer_idx=1, num_layers=3)
    assert layer.slopes.numbers == decay_slopes("transnormer", 2, 1, 3)
    attention = SoftmaxAttention(16, num_heads=2, alibi=True)
    assert attention.alibi is not None
    assert attention.alibi.numbers == [1 / 16, 1 / 256]


def test_constants_are_neither_cast_nor_saved_nor_lost_on_the_meta_device():
    numbers = decay_slopes("retnet", 6)
    with torch.device("meta"):
        unmade = nn.Sequential(Slopes(numbers, 6))
    for model in (nn.Sequential(Slopes(numbers, 6)), unmade.to_empty(device="cpu")):
        for changed in (model, model.bfloat16(), model.double()):
            assert changed[0]().dtype == torch.float32
            assert changed[0]().tolist() == pytest.approx(numbers, rel=1e-7)
        assert not model.state_dict()
        assert not list(model.parameters())
