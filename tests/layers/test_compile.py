"""Layers compile without a graph break where there is no cache."""

import pytest
import torch

from hybridattn.layers import (
    GatedLinearAttention,
    LightningAttention,
    PrefixLinearAttention,
    Retention,
    TaylorLinearAttention,
    TokenMixer,
)

D = 12
LAYERS = {
    "gla": lambda: GatedLinearAttention(D, num_heads=2),
    "gla, a gate per head": lambda: GatedLinearAttention(D, num_heads=2, gate_per="head"),
    "taylor": lambda: TaylorLinearAttention(D, num_heads=2, key_dim=4),
    "prefix": lambda: PrefixLinearAttention(D, num_heads=2, key_dim=4),
    "retention": lambda: Retention(D, num_heads=2),
    "lightning": lambda: LightningAttention(D, num_heads=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_graph_break(name: str):
    layer: TokenMixer = LAYERS[name]().double()
    arguments = {"prefix_lengths": torch.tensor([5, 0])} if name == "prefix" else {}
    x, results = torch.randn(2, 11, D).double(), []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        o = run(x, **arguments)
        o.square().sum().backward()
        results.append([o.detach(), *(p.grad.clone() for p in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
