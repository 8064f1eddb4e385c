"""Softmax attention with each of its options against the formula, computed token by token."""

from typing import Any

import pytest
import torch

from hybridattn.layers import Cache, SoftmaxAttention
from hybridattn.layers.rotary import rotary_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi": True, "rope_theta": None},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 0.3},
    "qk norm": {"qk_norm": True, "norm_eps": 0.1},
    "biases": {"bias": True},
    "yarn": {"rope_scaling": YARN},
    "all": {
        "window": 3,
        "bias": True,
        "alibi": True,
        "sinks": True,
        "softcap": 0.3,
        "qk_norm": True,
        "rope_scaling": YARN,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_softmax_attention_equals_the_formula(name: str):
    options, (heads, kv_heads, dim, tokens) = OPTIONS[name], (4, 2, 6, 8)
    layer = SoftmaxAttention(24, heads, kv_heads, **options).double()
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)  # so that norms, sinks and large scores affect the output
    x = torch.randn(1, tokens, 24).double()

    def normed(y: torch.Tensor, norm: str) -> torch.Tensor:
        if "qk_norm" not in options:
            return y
        return y / (y.square().mean() + options.get("norm_eps", 1e-6)).sqrt() * getattr(layer, norm).weight

    def projected(y: torch.Tensor, projection: torch.nn.Linear) -> torch.Tensor:
        return y @ projection.weight.T + (projection.bias if "bias" in options else 0)

    def turned(y: torch.Tensor, position: int) -> torch.Tensor:
        if options.get("rope_theta", 1) is None:
            return y
        frequencies, factor = rotary_frequencies(dim, 10000.0, options.get("rope_scaling"))
        z = torch.complex(y[: dim // 2], y[dim // 2 :]) * torch.exp(1j * position * frequencies.double()) * factor
        return torch.cat((z.real, z.imag))

    q = projected(x[0], layer.q_proj).unflatten(-1, (heads, dim))
    k, v = (projected(x[0], p).unflatten(-1, (kv_heads, dim)) for p in (layer.k_proj, layer.v_proj))
    rows = []
    for t in range(tokens):
        row = []
        for h in range(heads):
            weights, total = 0.0, torch.zeros(dim).double()
            if layer.sinks is not None:
                weights = layer.sinks[h].exp()
            for s in range(max(0, t - options.get("window", 99) + 1), t + 1):
                query, key = turned(normed(q[t, h], "q_norm"), t), turned(normed(k[s, h // 2], "k_norm"), s)
                score = query @ key * dim**-0.5
                if "softcap" in options:
                    score = options["softcap"] * torch.tanh(score / options["softcap"])
                if "alibi" in options:
                    score = score - 2.0 ** (-8 * (h + 1) / heads) * (t - s)
                weights, total = weights + score.exp(), total + score.exp() * v[s, h // 2]
            row.append(total / weights)
        rows.append(torch.cat(row))
    torch.testing.assert_close(layer(x)[0], projected(torch.stack(rows), layer.o_proj), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_options_with_large_scores_and_caches(name: str, window: int | None):
    """Chunks, then steps, that wrap around the ring buffer equal one pass, with scores that every option changes."""
    layer = SoftmaxAttention(24, 4, 2, **{**OPTIONS[name], "window": window}).double()
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
    x, cache = torch.randn(2, 23, 24).double(), Cache()
    parts = [layer(part, cache=cache) for part in x.split([4, 5, *[1] * 14], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-7, atol=1e-9)
