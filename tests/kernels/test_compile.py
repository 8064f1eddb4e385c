"""Operators as opaque ops: what torch.library asks of them, and torch.compile without a graph break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybridattn.kernels.linear_attention import (
    chunked,
    gated_linear_attention,
    linear_attention,
    prefix_linear_attention,
    taylor_linear_attention,
)

B, T, H, K, V = 2, 21, 2, 4, 3


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).double()


@pytest.mark.parametrize("gates", [None, (B, T, H, K), (B, T, H, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("taylor", [None, 0.5])
def test_opcheck(gates: tuple[int, ...] | None, packed: bool, taylor: float | None):
    if taylor is not None and gates is not None:
        return  # there is no Taylor attention with gates
    batch = 1 if packed else B
    q, k, v = randn(batch, T, 2 * H, K), randn(batch, T, H, K), randn(batch, T, H, V)
    g = None if gates is None else -torch.rand(gates).double()[:batch]
    cu_seqlens = torch.tensor([0, 5, 5, 20]) if packed else None
    sequences = 3 if packed else B
    state = randn(sequences, H, K if taylor is None else 15, V)
    for grads in (False, True):
        inputs = [x if x is None else x.requires_grad_(grads) for x in (q, k, v, g, state)]
        arguments = (*inputs[:4], 0.7, taylor, inputs[4], cu_seqlens)
        torch.library.opcheck(torch.ops.hybridattn.linear_attention_chunked.default, arguments)
    with torch.no_grad():
        o, after, starts = chunked.forward(*arguments)
        arguments = (*(None if x is None else x.detach() for x in inputs[:4]), 0.7, taylor, starts, cu_seqlens)
        torch.library.opcheck(torch.ops.hybridattn.linear_attention_chunked_backward.default, (*arguments, o, after))


CALLS: dict[str, Callable[..., Any]] = {
    "linear": lambda q, k, v: linear_attention(q, k, v)[0],
    "linear, normalized": lambda q, k, v: linear_attention(q.exp(), k.exp(), v, normalize=True)[0],
    "gated per channel": lambda q, k, v: gated_linear_attention(q, k, v, -k.exp())[0],
    "gated per head, with states": lambda q, k, v: gated_linear_attention(
        q, k, v, -k.exp().mean(-1), initial_state=k.new_ones(B, H, K, V), output_final_state=True
    )[1],
    "grouped values": lambda q, k, v: gated_linear_attention(q, k, torch.cat((v, v), 2), -k.exp())[0],
    "taylor": lambda q, k, v: taylor_linear_attention(q, k, v)[0],
    "prefix": lambda q, k, v: prefix_linear_attention(q, k, v, k[:, :5], v[:, :5])[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name: str):
    call = CALLS[name]
    inputs = [randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, V)]
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = run(*leaves)
        o.square().sum().backward()
        results.append([o.detach(), *(x.grad for x in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
