"""The operators' opaque ops pass torch.library.opcheck, and torch.compile traces operators without a graph break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybridattn.kernels.flash_attention import BlockMask, blocked, flash_attention, flash_decode
from hybridattn.kernels.linear_attention import (
    chunked,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
    prefix_linear_attention,
    taylor_linear_attention,
    taylor_linear_attention_step,
)

B, T, H, K, V = 2, 21, 2, 4, 3
OFFSETS, LENGTHS = torch.tensor([0, 5, 5, 20]), torch.tensor([4, 17])
MASK = BlockMask(torch.tensor([0, 1, 2, 4]), torch.tensor([0, 0, 1, 2]), 8)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).double()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gates", "packed", "taylor"),
    [(None, False, None), ((B, T, H, K), True, None), ((B, T, H, 1), False, None), (None, True, 0.5)],
)
def test_opcheck(gates: tuple[int, ...] | None, packed: bool, taylor: float | None):
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


OPTIONS = {
    "none": (0.5, None, 0, None, None, None, None, None, None),
    "window to both sides": (0.5, 5, 3, None, None, None, None, None, None),
    "slopes, sinks, softcap": (
        0.5,
        9,
        0,
        torch.tensor([0.5, 0.1, 1, 2]),
        torch.tensor([0.1, 1, -1, 0]),
        2.0,
        *[None] * 3,
    ),
    "block mask": (0.5, None, 0, None, None, None, torch.tensor([0, 1, 2, 4]), torch.tensor([0, 0, 1, 2]), 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("none", "cache"),
        ("window to both sides", "packed"),
        ("slopes, sinks, softcap", "batch"),
        ("slopes, sinks, softcap", "cache"),
        ("block mask", "batch"),
    ],
)
def test_opcheck_of_softmax_attention(name: str, keys: str):
    options, batch = OPTIONS[name], 1 if keys == "packed" else B
    q, k, v = randn(batch, T, 2 * H, K), randn(batch, T, H, K), randn(batch, T, H, V)
    positions, offsets = (None, None), (None, None)
    if keys == "packed":
        offsets = torch.tensor([0, 5, 5, 20]), torch.tensor([0, 9, 11, 21])
    if keys == "cache":
        positions = torch.arange(T).expand(B, T), torch.arange(T).flip(0).expand(B, T)
    for grads in (False, True):
        inputs = [x.requires_grad_(grads) for x in (q, k, v)]
        sinks = options[4] if options[4] is None else options[4].double().requires_grad_(grads)
        arguments = (*inputs, *positions, *options[:4], sinks, *options[5:], *offsets)
        torch.library.opcheck(torch.ops.hybridattn.flash_attention_blocked.default, arguments)
    with torch.no_grad():
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        o, lse = blocked.forward(*arguments)
        arguments = (*arguments, o, lse, torch.randn_like(o), torch.randn_like(lse))
        torch.library.opcheck(torch.ops.hybridattn.flash_attention_blocked_backward.default, arguments)


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
    "packed": lambda q, k, v: gated_linear_attention(q[:1], k[:1], v[:1], -k[:1].exp(), cu_seqlens=OFFSETS)[0],
    "softmax": lambda q, k, v: flash_attention(q, k, v),
    "softmax, window": lambda q, k, v: flash_attention(q, k, v, window=4),
    "softmax, sinks": lambda q, k, v: flash_attention(q, k, v, sinks=v[0, 0, :, 0]),
    "softmax, block mask": lambda q, k, v: flash_attention(q, k, v, block_mask=MASK),
    "softmax, log-sum-exp": lambda q, k, v: flash_attention(q, k, v, return_lse=True)[1],
    "softmax, packed": lambda q, k, v: flash_attention(q[:1], k[:1], v[:1], window=4, cu_seqlens_q=OFFSETS),
    "softmax, packed, ALiBi": lambda q, k, v: flash_attention(
        q[:1], k[:1], v[:1], alibi_slopes=q.new_ones(H), cu_seqlens_q=OFFSETS
    ),
    "decode": lambda q, k, v: flash_decode(q[:, :3], k, v, cache_lengths=LENGTHS),
    "decode, one token": lambda q, k, v: flash_decode(q[:, :1], k, v, cache_lengths=LENGTHS),
    "decode, ring, sinks": lambda q, k, v: flash_decode(
        q[:, :3], k, v, cache_lengths=2 * LENGTHS, window=9, sinks=v[0, 0, :, 0]
    ),
}


def step(operator: Callable[..., Any], pair: bool = False) -> Callable[..., Any]:
    """Run one token against a state that is updated in place; returns outputs and states."""

    def call(q, k, v, *rest):
        state = k.new_zeros(B, H, K if operator is not taylor_linear_attention_step else 15, V)
        states = (state, state[..., 0].clone()) if pair else (state,)
        o = operator(q, k, v, *rest, states if pair else state, **({"normalize": True} if pair else {}))
        return o, *states

    return call


STEPS = {
    "linear": step(linear_attention_step),
    "linear, normalized": step(linear_attention_step, pair=True),
    "taylor": step(taylor_linear_attention_step, pair=True),
    "gated": lambda q, k, v: step(gated_linear_attention_step)(q, k, v, -k.exp()),
}


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_steps_compile_without_a_graph_break(name: str, tokens: int):
    inputs = [randn(B, tokens, H, K), randn(B, tokens, H, K), randn(B, tokens, H, V)]
    eager, compiled = (
        run(*inputs) for run in (STEPS[name], torch.compile(STEPS[name], fullgraph=True, backend="aot_eager"))
    )
    assert all(x.any() for x in eager)
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(y, x)


@pytest.mark.slow
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
