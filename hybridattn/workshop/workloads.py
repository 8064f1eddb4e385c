"""Workloads that ``hybridattn kernels bench`` times: operators with their inputs, FLOP and bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridattn.kernels.flash_attention import flash_attention, flash_decode
from hybridattn.kernels.linear_attention import (
    gated_delta_rule,
    gated_delta_rule_step,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    taylor_linear_attention,
)
from hybridattn.kernels.linear_attention.chunks import CHUNK
from hybridattn.workshop.check import error

COMPARED = 768  # tokens, from the first, whose results are compared with the reference

Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]


class Shape(NamedTuple):
    """Sizes of q, k and v; ``tokens`` is the length of the sequence or of the cache."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int


class Workload(NamedTuple):
    """An operator of this package, and the properties that the benchmark needs.

    Attributes:
        operator: function of q, k, v [batch, time, heads, dim], then g, state or cache lengths if it has them, and of
            the keyword ``backend``; returns the outputs.
        flop: shape -> FLOP that a forward pass needs per token and head.
        kind: "sequence" (a whole sequence), "step" (one token updates a state), "cache" (one token reads a cache).
        gate: "channel" (a gate per channel of k), "head" (a gate per head) or None.
        window: tokens that a token attends to, itself included; None for all.
        causal: whether a token attends to no later token.
        key_dim: K, if not the benchmark's default.
        delta: whether the operator has a strength of writing beta after g, and keys of norm 1.
    """

    operator: Call
    flop: Callable[[Shape], float]
    kind: Literal["sequence", "step", "cache"] = "sequence"
    gate: Literal["channel", "head", None] = None
    window: int | None = None
    causal: bool = True
    key_dim: int | None = None
    delta: bool = False


def _linear_flop(shape: Shape) -> float:
    """Return the FLOP per token and head: 2KV to update the state, 2KV to read it, and half of a chunk's products."""
    return 4 * shape.key_dim * shape.value_dim + CHUNK * (shape.key_dim + shape.value_dim)


def _delta_flop(shape: Shape) -> float:
    """Return the FLOP per token and head: one more read of the state, and the products of keys and of the inverse."""
    return _linear_flop(shape) + 2 * shape.key_dim * shape.value_dim + CHUNK * (shape.key_dim + shape.value_dim)


def _outputs(operator: Callable[..., Any], *x: Tensor, backend: str | None = None) -> Tensor:
    return operator(*x, backend=backend)[0]


def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, backend: str | None = None) -> Tensor:
    return flash_decode(q, k, v, cache_lengths=lengths, backend=backend)


def _softmax(window: int | None = None, causal: bool = True) -> Workload:
    def flop(shape: Shape) -> float:
        reach = min(window or shape.tokens, shape.tokens)
        # In a causal sequence the first `reach` tokens attend to reach / 2 tokens on average, later ones to `reach`.
        seen = reach * (1 - reach / (2 * shape.tokens)) if causal else reach
        return 2 * seen * (shape.key_dim + shape.value_dim)

    return Workload(partial(flash_attention, window=window, causal=causal), flop, window=window, causal=causal)


WORKLOADS = {
    "gated, per channel": Workload(partial(_outputs, gated_linear_attention), _linear_flop, gate="channel"),
    "gated, per head": Workload(partial(_outputs, gated_linear_attention), _linear_flop, gate="head"),
    "no gate": Workload(partial(_outputs, linear_attention), _linear_flop),
    "taylor": Workload(
        partial(_outputs, taylor_linear_attention),
        lambda s: 2 * (s.key_dim + 1) * (s.key_dim + 2) * s.value_dim,
        key_dim=16,
    ),
    "gated step": Workload(
        gated_linear_attention_step, lambda s: 5 * s.key_dim * s.value_dim, kind="step", gate="channel"
    ),
    "delta, per channel": Workload(
        partial(_outputs, partial(gated_delta_rule, normalize_qk=True)), _delta_flop, gate="channel", delta=True
    ),
    "delta, per head": Workload(
        partial(_outputs, partial(gated_delta_rule, normalize_qk=True)), _delta_flop, gate="head", delta=True
    ),
    "delta step": Workload(
        partial(gated_delta_rule_step, normalize_qk=True),
        lambda s: 7 * s.key_dim * s.value_dim,
        kind="step",
        gate="head",
        delta=True,
    ),
    "softmax, causal": _softmax(),
    "softmax, full": _softmax(causal=False),
    "softmax, window 512": _softmax(window=512),
    "softmax, window 4096": _softmax(window=4096),
    "softmax, one token": Workload(_decode, lambda s: 2 * (s.key_dim + s.value_dim), kind="cache"),
}


def make_inputs(workload: Workload, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw signed inputs; gates are GLA's default logsigmoid(N(0, 1)) / 16, and a step's state is fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    rows, dims = shape[:3], (shape.key_dim, shape.key_dim, shape.value_dim)
    x = {name: normal(*rows, dim).to(dtype) for name, dim in zip("qkv", dims, strict=True)}
    if workload.gate:
        gates = normal(*rows, shape.key_dim) if workload.gate == "channel" else normal(*rows)
        x["g"] = F.logsigmoid(gates).div(16).to(dtype)
    if workload.delta:
        x["beta"] = normal(*rows).sigmoid().to(dtype)
    if workload.kind == "cache":
        x["q"] = x["q"][:, :1].contiguous()
        x["lengths"] = torch.full((shape.batch,), shape.tokens, device=device)
    if workload.kind == "step":
        x["state"] = normal(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return x


def work_of(workload: Workload, shape: Shape, x: Inputs) -> tuple[float, int]:
    """Return the FLOP of a forward pass and the bytes it has to move: all inputs, the outputs, a step's new state."""
    outputs = shape.batch * x["q"].shape[1] * shape.heads * shape.value_dim * x["v"].element_size()
    read = sum(value.numel() * value.element_size() for value in x.values())
    written = outputs + (x["state"].numel() * 4 if workload.kind == "step" else 0)
    return workload.flop(shape) * shape.batch * shape.tokens * shape.heads, read + written


def error_of(workload: Workload, call: Call, x: Inputs) -> float:
    """Return the largest relative L2 error against the fp64 reference, over outputs and gradients of the first row.

    For sequences the loss covers the first COMPARED tokens. Steps and decoding have no gradients.
    """
    row = {name: value[:1] if name == "lengths" else value[:1].double() for name, value in x.items()}
    reference = partial(workload.operator, backend="reference")
    if workload.kind != "sequence":
        with torch.no_grad():
            return error(call(*(value.clone() for value in x.values()))[:1], reference(*row.values()))
    # Without causality the compared queries need all keys and values.
    row = {name: value[:, :COMPARED] if workload.causal or name == "q" else value for name, value in row.items()}
    results = []
    for run, inputs in ((reference, row), (call, x)):
        leaves = [value.detach().requires_grad_() for value in inputs.values()]
        o = run(*leaves)[:1, :COMPARED]
        do = torch.cos(torch.arange(o.numel(), device=o.device)).view(o.shape)
        gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
        compared = (gradient[:1, : like.shape[1]] for gradient, like in zip(gradients, row.values(), strict=True))
        results.append([o.detach(), *compared])
    return max(error(actual, expected) for expected, actual in zip(*results, strict=True))
