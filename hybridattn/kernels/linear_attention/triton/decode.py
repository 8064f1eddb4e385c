"""The decoding kernel and ops of linear attention: one or a few new tokens in one launch, the state updated in place.

B batch, T new tokens, K key dim, V value dim; q [B,T,Hq,K], k [B,T,H,K], v [B,T,Hs,V], g [B,T,Hg,K or 1] or None,
state [B,Hs,K,V], o [B,T,max(Hq,Hs),V]. The delta rule also has beta [B,T,Hs].

A program keeps BLOCK_V columns of one head's state, with all K rows, in registers. It reads and writes each element of
the state once for all T tokens. No two programs write the same address and every sum has a fixed order, so results are
bitwise reproducible. Grid and arguments depend on shapes alone, so launches can be captured in CUDA graphs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.architectures import architecture, launching, warn_of_launch
from ...runtime.opaque_ops import opaque_op
from .launch import StepLaunch, step_launch


# ``scale`` is never specialised: ptxas 12.8 miscompiles some kernels for sm_90 if it is the constant 1.
@triton.jit(do_not_specialize=["scale"])
def step_kernel(
    q,
    k,
    v,
    g,
    beta,  # of the delta rule: (pointer, strides of batch, time and head); else None
    state,
    o,
    scale,
    tokens,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    v_batch,
    v_time,
    v_head,
    g_batch,
    g_time,
    g_head,
    state_batch,
    state_head,
    state_key,
    K: tl.constexpr,
    V: tl.constexpr,
    STATES: tl.constexpr,  # heads of the state
    QUERIES: tl.constexpr,  # query heads that read one state
    QUERY_SHARE: tl.constexpr,  # states that one query head reads
    KEY_SHARE: tl.constexpr,  # states that one key head writes
    GATE_SHARE: tl.constexpr,  # states that one gate decays; 0 without gates
    GATE_PER_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,  # divide queries and keys by sqrt(sum of squares + 1e-6)
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(0) // blocks
    batch, head = (row // STATES).to(tl.int64), (row % STATES).to(tl.int64)
    keys = tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = keys < K, columns < V

    q += batch * q_batch + head // QUERY_SHARE * QUERIES * q_head + keys
    k += batch * k_batch + head // KEY_SHARE * k_head + keys
    v += batch * v_batch + head * v_head + columns
    if GATE_SHARE:
        g += batch * g_batch + head // GATE_SHARE * g_head
    if beta is not None:
        strength = beta[0] + batch * beta[1] + head * beta[3]
    o += (batch * tokens * STATES + head) * QUERIES * V + columns
    state += batch * state_batch + head * state_head + keys[:, None] * state_key + columns[None, :]

    in_state = in_k[:, None] & in_v[None, :]
    s = tl.load(state, mask=in_state, other=0.0)
    for _ in range(tokens):
        if GATE_SHARE:
            if GATE_PER_CHANNEL:
                s *= tl.exp(tl.load(g + keys, mask=in_k, other=0.0).to(tl.float32))[:, None]
            else:
                s *= tl.exp(tl.load(g).to(tl.float32))
            g += g_time
        key = tl.load(k, mask=in_k, other=0.0).to(tl.float32)
        if NORMALIZE:
            key *= tl.rsqrt(tl.sum(key * key) + 1e-6)
        value = tl.load(v, mask=in_v, other=0.0).to(tl.float32)
        if beta is not None:
            value = tl.load(strength).to(tl.float32) * (value - tl.sum(key[:, None] * s, axis=0))
            strength += beta[2]
        s += key[:, None] * value[None, :]
        for j in tl.static_range(QUERIES):  # pyright: ignore[reportGeneralTypeIssues]
            query = tl.load(q + j * q_head, mask=in_k, other=0.0).to(tl.float32)
            if NORMALIZE:
                query *= tl.rsqrt(tl.sum(query * query) + 1e-6)
            read = scale * tl.sum(query[:, None] * s, axis=0)
            tl.store(o + j * V, read.to(o.dtype.element_ty), mask=in_v)
        q += q_time
        k += k_time
        v += v_time
        o += STATES * QUERIES * V
    tl.store(state, s, mask=in_state)


@opaque_op("hybridattn::linear_attention_step_triton", mutates_args=("state",))
def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    """Compute outputs [B,T,max(Hq,Hs),V] in v's dtype and update the state in place.

    Shapes are those of the module docstring; the state is fp32.
    """
    return _run(q, k, v, g, None, scale, False, state)


@step.register_fake
def _(q, k, v, g, scale, state):
    return _outputs(q, v, state)


@opaque_op("hybridattn::gated_delta_rule_step_triton", mutates_args=("state",))
def delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float, normalize: bool, state: Tensor
) -> Tensor:
    """Compute outputs of the delta rule, [B,T,max(Hq,Hs),V] in v's dtype, and update the state in place.

    Shapes are those of the module docstring; the state is fp32. With ``normalize`` the kernel divides queries and keys
    by ``sqrt(sum of squares + 1e-6)``.
    """
    return _run(q, k, v, g, beta, scale, normalize, state)


@delta_step.register_fake
def _(q, k, v, g, beta, scale, normalize, state):
    return _outputs(q, v, state)


def _outputs(q: Tensor, v: Tensor, state: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:2], max(q.shape[2], state.shape[1]), state.shape[3])


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: bool,
    state: Tensor,
) -> Tensor:
    """Allocate the outputs and launch the kernel."""
    batch, tokens = q.shape[:2]
    states, key_dim, value_dim = state.shape[1:]
    o = _outputs(q, v, state)
    if not o.numel() or not state.numel():
        return o.zero_()
    if state.stride(3) != 1:  # an unusual layout: supported at the cost of a copy
        kept = state.contiguous()
        o = _run(q, k, v, g, beta, scale, normalize, kept)
        state.copy_(kept)
        return o
    q, k, v = map(_dense_rows, (q, k, v))
    g = None if g is None else _dense_rows(g)
    launch = _launch(q.device, key_dim)
    with launching(launch.name, q):
        step_kernel[(batch * states * triton.cdiv(value_dim, launch.block_v),)](
            q,
            k,
            v,
            g,
            None if beta is None else (beta, *beta.stride()),
            state,
            o,
            float(scale),
            tokens,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *((0, 0, 0) if g is None else g.stride()[:3]),
            *state.stride()[:3],
            **step_constexprs(launch, q, k, g, state),
            NORMALIZE=normalize,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
            num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
        )
    return o


def step_constexprs(launch: StepLaunch, q: Tensor, k: Tensor, g: Tensor | None, state: Tensor) -> dict[str, int | bool]:
    """Return the kernel's constexprs for tensors of these shapes."""
    queries, states = q.shape[2], state.shape[1]
    return {
        "K": state.shape[2],
        "V": state.shape[3],
        "STATES": states,
        "QUERIES": max(queries // states, 1),
        "QUERY_SHARE": max(states // queries, 1),
        "KEY_SHARE": states // k.shape[2],
        "GATE_SHARE": 0 if g is None else states // g.shape[2],
        "GATE_PER_CHANNEL": g is not None and g.shape[3] > 1,
        "BLOCK_K": launch.block_k,
        "BLOCK_V": launch.block_v,
    }


def _dense_rows(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension; a copy is rarely needed."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


@cache
def _launch(device: torch.device, key_dim: int) -> StepLaunch:
    """Return the launch row; on a GPU, warn once if the row is not verified there."""
    name = architecture(device)
    launch = step_launch(name, key_dim)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch
