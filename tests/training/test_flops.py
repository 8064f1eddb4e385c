"""Counts of operations, compared with torch's counter, and with counts by hand for products inside an operator."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.training.flops import count, visible_keys

# Inside the operator, per token, hidden size 32 and 2 heads: multiply-adds as two, state updated and read,
# by the delta rule read twice; and short convolutions.
BY_HAND = {
    "gla": 2 * 4 * 8 * 16,
    "retention": 2 * 4 * 16 * 32,
    "lightning": 2 * 4 * 16 * 16,
    "linear": 2 * 4 * 16 * 16,
    "taylor": 2 * 4 * (1 + 4 + 10) * 16,
    "prefix": 2 * 4 * (1 + 4 + 10) * 16,
    "delta": 2 * 6 * 16 * 16,
    "gated_delta": 2 * 6 * 12 * 24 + 2 * 4 * (24 + 24 + 48),
    "kda": 2 * 6 * 16 * 16,
    "mamba2": 2 * 4 * 128 * 64 + 2 * 4 * (128 + 2 * 128),
    "conv": 2 * 3 * 64,
    "full": 0,
    "window": 0,
}


def build(mixer: str, **options) -> HybridAttnForCausalLM:
    mixer_options = {} if mixer == "conv" else {"num_heads": 2, **options}
    if mixer in ("taylor", "prefix"):
        mixer_options["key_dim"] = 4
    if mixer in ("delta", "kda"):
        mixer_options["conv_size"] = None
    config = HybridAttnConfig(
        vocab_size=50, hidden_size=32, mixers=[mixer], mixer_options={mixer: mixer_options}, intermediate_size=64
    )
    return HybridAttnForCausalLM(config)


@pytest.mark.parametrize("mixer", BY_HAND)
def test_products_outside_the_operator_are_what_torch_counts(mixer: str):
    model = build(mixer)
    linear = {f"HybridAttnForCausalLM.{name}" for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, dtype=torch.long))
    counted = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name in linear)
    flops = count(model)
    assert flops.forward_per_token * 8 == counted + BY_HAND[mixer] * 8
    assert flops.training_per_token == 3 * flops.forward_per_token


def test_softmax_attention_counts_the_keys_a_query_may_see():
    flops = count(build("full"))
    assert flops.attention == ((4 * 2 * 16, None),)
    assert flops.forward([5, 3]) == 8 * flops.forward_per_token + 4 * 2 * 16 * (15 + 6)
    assert flops.training([5]) == 3 * flops.forward([5])
    assert count(build("window", window=3)).attention == ((4 * 2 * 16, 3),)
    for length, window in ((5, None), (5, 3), (3, 5), (1, 1), (0, None)):
        assert visible_keys(length, window) == sum(min(t + 1, window or length) for t in range(length))


def test_frozen_weights_need_no_gradient():
    model = build("gla")
    flops = count(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count(model).training_per_token == 2 * flops.forward_per_token + BY_HAND["gla"]


def test_nothing_is_allocated_for_it():
    config = HybridAttnConfig(mixers=["gla"] * 24)
    with torch.device("meta"):
        model = HybridAttnForCausalLM(config)
    # two operations per weight but those of embeddings, norms and biases, and the states
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    assert count(model).forward_per_token == 2 * weights + 24 * 4 * 4 * 128 * 256
