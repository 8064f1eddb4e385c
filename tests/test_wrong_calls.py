"""Errors for wrong calls of public functions and classes that a new user may make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hybridattn as ha
from hybridattn.kernels.runtime import checks

Q, X = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 16)
IDS = torch.arange(16).view(2, 8)


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
        "cache: expected a hybridattn.layers.Cache or None, got dict",
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
