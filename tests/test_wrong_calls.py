"""Errors for wrong calls of public functions and classes that a new user may make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hybridattn as ha
from hybridattn.kernels.runtime import checks

Q, X = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 16)
IDS = torch.arange(16).view(2, 8)


MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])


def used(layer: ha.TokenMixer) -> ha.Cache:
    """Return a cache of ``layer`` that holds tokens."""
    cache = ha.Cache()
    layer(X, cache=cache)
    return cache


def model() -> ha.HybridAttnForCausalLM:
    return ha.HybridAttnForCausalLM(ha.HybridAttnConfig(vocab_size=32, hidden_size=16))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "heads that do not divide": (
        lambda: ha.GatedLinearAttention(64, num_heads=3),
        "num_heads: expected a divisor of hidden_size / 2 = 32, got 3",
    ),
    "2-D input of a recurrent layer": (
        lambda: ha.GatedLinearAttention(16, num_heads=2)(X[0]),
        r"hidden_states: expected shape \[B, T, hidden_size=16\], got \[8, 16\]",
    ),
    "width of softmax attention": (
        lambda: ha.SoftmaxAttention(32)(X),
        r"hidden_states: expected shape \[B, T, hidden_size=32\], got \[2, 8, 16\]",
    ),
    "width of a linear layer": (lambda: ha.LinearAttention(32)(X), "hidden_states: expected shape"),
    "width of a prefix layer": (
        lambda: ha.PrefixLinearAttention(32)(X, prefix_lengths=torch.tensor([1, 1])),
        "hidden_states: expected shape",
    ),
    "width of a gated convolution": (lambda: ha.BaseConv(32)(X), "hidden_states: expected shape"),
    "channels of a short convolution": (lambda: ha.ShortConvolution(32)(X), "hidden_states: expected shape"),
    "a mapping for a cache": (
        lambda: ha.GatedLinearAttention(16, num_heads=2)(X, cache={}),  # pyright: ignore
        "cache: expected a hybridattn.Cache or None, got dict",
    ),
    "a cache of a layer with another window": (
        lambda: ha.SoftmaxAttention(16, window=9)(X, cache=used(ha.SoftmaxAttention(16, window=4))),
        r"cache: expected keys of shape \[2, 9, 4, 4\], of this layer, got \[2, 4, 4, 4\]",
    ),
    "a cache of another operator": (
        lambda: ha.LinearAttention(16, num_heads=2)(X, cache=used(ha.GatedLinearAttention(16, num_heads=2))),
        r"cache: expected one of this layer, with \['k_sum', 'state'\], got one with \['state'\]",
    ),
    "a cache of another kind of layer": (
        lambda: ha.GatedLinearAttention(16, num_heads=2)(X, cache=used(ha.SoftmaxAttention(16))),
        r"cache: expected one of this layer, with \['state'\], got one with \['keys', 'lengths', 'values'\]",
    ),
    "offsets in a list": (
        lambda: ha.GatedLinearAttention(16, num_heads=2)(X[:1], cu_seqlens=[0, 8]),  # pyright: ignore
        "cu_seqlens: expected a tensor of integer offsets",
    ),
    "positions of another length": (
        lambda: ha.SoftmaxAttention(16)(X, position_ids=torch.arange(5)[None]),
        r"position_ids: expected shape \[B=1, T=8\], got \[1, 5\]",
    ),
    "a layer's name for packing": (
        lambda: model()(IDS[:1], cu_seqlens=torch.tensor([0, 8])),
        "cu_seqlens: expected the name cu_seq_lens_q",
    ),
    "labels of tokens of no sequence": (
        lambda: model()(IDS[:1], labels=IDS[:1], cu_seq_lens_q=torch.tensor([0, 5])),
        r"labels: expected -100 for tokens past the last of the offsets \[0, 5\]",
    ),
    "positions that start again in a padded row": (
        lambda: model()(IDS[:1], attention_mask=MASK, position_ids=torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3]])),
        "position_ids: expected ascending positions",
    ),
    "labels of another dtype": (lambda: model()(IDS, labels=IDS.int()), "labels: expected int64, got torch.int32"),
    "a flag that is no flag": (
        lambda: ha.flash_attention(Q, Q, Q, causal="no"),  # pyright: ignore
        "causal: expected True or False, got 'no'",
    ),
    "short labels": (lambda: model()(IDS, labels=IDS[:, :5]), r"labels: expected shape \[2, 8\], got \[2, 5\]"),
    "labels with some logits": (
        lambda: model()(IDS, labels=IDS, logits_to_keep=1),
        "logits_to_keep: expected 0 with labels",
    ),
    "a window without a direction": (
        lambda: ha.flash_attention(Q, Q, Q, causal=False, window=4),
        r"window: expected a pair \(left, right\) or None without causal=True, got 4; a causal window=4 is \(3, 0\)",
    ),
    "a window that sees later keys": (
        lambda: ha.flash_attention(Q, Q, Q, window=(4, 4)),
        r"window: expected a pair \(left, 0\) with causal=True, got \(4, 4\)",
    ),
    "positive gates": (
        lambda: ha.gated_linear_attention(Q, Q, Q, torch.rand(2, 8, 4)),
        "g: expected natural-log decays <= 0",
    ),
    "query heads that key heads do not divide": (
        lambda: ha.flash_attention(Q, Q[:, :, :3], Q[:, :, :3]),
        "q: expected a multiple of the 3 heads of k, got 4",
    ),
    "numpy arrays": (
        lambda: ha.flash_attention(Q.numpy(), Q, Q),
        r"q: expected a tensor \[B, Tq, Hq, D\], got ndarray",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_wrong_argument(name: str):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_offloaded_cache_is_refused():
    with pytest.raises(ValueError, match="past_key_values: expected a cache on the model's device, got an offloaded"):
        model().generate(IDS, max_new_tokens=2, cache_implementation="offloaded")


def test_heads_before_time_cause_one_warning():
    checks._warn_of_layout.cache_clear()
    q = torch.randn(2, 4, 48, 8)
    with pytest.warns(UserWarning, match=r"pass x.transpose\(1, 2\)") as warned:
        ha.flash_attention(q, q, q)
    assert warned[0].filename == __file__
    ha.linear_attention(q, q, q)
    checks._warn_of_layout.cache_clear()
    few, packed = torch.randn(2, 4, 8, 8), q[:1]
    ha.flash_attention(few, few, few)
    ha.linear_attention(packed, packed, packed, cu_seqlens=torch.tensor([0, 1, 4]))
