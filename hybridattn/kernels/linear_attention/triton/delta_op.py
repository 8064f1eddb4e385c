"""The torch ops of the chunked gated delta rule in Triton, forward and backward: allocation, launches, autograd.

B batch, T time, N sequences; q [B,T,Hq,K], k [B,T,H,K], v [B,T,Hs,V], g [B,T,Hg,K], [B,T,Hg,1] or None, beta [B,T,Hs],
state [N,Hs,K,V], o [B,T,max(Hq,Hs),V]. If a tensor has fewer heads than o, neighbouring heads of o share a head of it.

A sequence is not split into segments, unlike those of ``op``: the transition of a segment would be a K x K matrix.

An exception to the first law: with fp16 operands and gates of -60 to 0 per channel, the error of the gradient of beta
was 2.04 times that of rounded operands, not 2.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# pyright takes a launch for a call of the Python function.

import torch
import triton
from torch import Tensor

from ...runtime.architectures import launching
from ...runtime.opaque_ops import opaque_op
from .delta_backward import delta_gradients, sweep_gradients
from .delta_chunks import solve_chunks
from .delta_forward import sweep_delta
from .launch import operand_name, tile_columns
from .op import (
    _channel,
    _constexprs,
    _dense,
    _describable,
    _gate,
    _gates,
    _gradients_of,
    _launch,
    _precision,
    _slots,
    _summed,
    _terms,
    _tile,
)

Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""What ``solve_chunks`` computes, empty where there is none.

M of all chunks [B,T,Hs,64], fp16 for bf16 operands; inverse norms of the keys, fp32 [B,T,Hs]; scores of hot
channels [B,T,heads of o,64], written only where there are any; flags of hot channels, int32 [slots,Hs,K].
"""


@opaque_op("hybridattn::gated_delta_rule_triton")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    normalize: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute outputs in v's dtype, final states in fp32, and the four tensors of ``Saved``."""
    o, last, *saved = _outputs(q, k, v, g, normalize, cu_seqlens)
    if not o.numel() or not last.numel():
        return o.zero_(), last.zero_() if state is None else last.copy_(state), *saved  # pyright: ignore[reportReturnType]
    q, k, v, g, cu_seqlens = _readable(q, k, v, g, cu_seqlens)
    first = None if state is None else state.contiguous()
    _solve(q, k, g, beta, saved, o.shape[2], cu_seqlens, operand_name(q, k, v))
    _sweep(q, k, v, g, o, saved, beta, None, first, last, cu_seqlens, scale)
    return o, last, *saved  # pyright: ignore[reportReturnType]


@forward.register_fake
def _(q, k, v, g, beta, scale, normalize, state, cu_seqlens):
    return _outputs(q, k, v, g, normalize, cu_seqlens)


@opaque_op("hybridattn::gated_delta_rule_triton_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    solved: Tensor,
    norms: Tensor,
    pairs: Tensor,
    hot: Tensor,
    do: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without gates), beta and the initial state.

    Args:
        q, k, v, g, beta, scale, state, cu_seqlens: as in ``forward``.
        solved, norms, pairs, hot: from ``forward``. Queries and keys are normalised if ``norms`` is not empty.
        do, dlast: gradients of outputs and final states.
    """
    given = (q, k, v, q.new_empty(0) if g is None else g, beta)
    if not do.numel() or not dlast.numel():
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given]
        return *zeros, dlast.clone(memory_format=torch.contiguous_format)  # pyright: ignore[reportReturnType]
    q, k, v, g, cu_seqlens = _readable(q, k, v, g, cu_seqlens)
    do, dlast, first = _dense(do), dlast.contiguous(), None if state is None else state.contiguous()
    operands, heads, saved = operand_name(q, k, v), do.shape[2], (solved, norms, pairs, hot)
    wide = torch.bfloat16 if operands == "bf16" else torch.float32
    r, dv = (_gradients_of(v, do, cu_seqlens, dtype) for dtype in (wide, None if operands == "bf16" else wide))
    rows = -(-k.shape[3] // 8) * 8
    h, dh = (do.new_empty(_slots(do, cu_seqlens)[0], v.shape[3], heads, rows, dtype=wide) for _ in "12")
    _sweep(q, k, v, g, r, saved, beta, h, first, None, cu_seqlens, scale)
    dbeta, dfirst = _sweep_back(q, k, g, do, r, dv, saved, beta, dh, dlast, cu_seqlens, scale, operands)
    dq, dk, dg = _gradients(q, k, g, do, r, dv, beta, h, dh, saved, cu_seqlens, scale, operands)
    grads = [_summed(y, x) for y, x in zip((dq, dk, dv, dg), given, strict=False)]
    dbeta = dbeta.sum(3).unflatten(2, (beta.shape[2], -1)).sum(3).to(beta.dtype)
    return grads[0], grads[1], grads[2], grads[3], dbeta, dfirst.unflatten(1, (dlast.shape[1], -1)).sum(2)


@backward.register_fake
def _(q, k, v, g, beta, scale, state, cu_seqlens, solved, norms, pairs, hot, do, dlast):
    given = (q, k, v, q.new_empty(0) if g is None else g, beta)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
    return (*grads, dlast.new_empty(dlast.shape))


def _save(ctx, inputs, output) -> None:
    q, k, v, g, beta, ctx.scale, _, state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, beta, state, cu_seqlens, *output[2:])


def _backward(ctx, do, dlast, *_):
    q, k, v, g, beta, state, cu_seqlens, *saved = ctx.saved_tensors
    inputs = (q, k, v, g, beta, ctx.scale, state, cu_seqlens)
    dq, dk, dv, dg, dbeta, dfirst = backward(*inputs, *saved, do, dlast)
    return dq, dk, dv, None if g is None else dg, dbeta, None, None, None if state is None else dfirst, None


forward.register_autograd(_backward, setup_context=_save)


def _outputs(q, k, v, g, normalize, cu_seqlens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of ``forward``."""
    (batch, tokens, states, value_dim), key_dim = v.shape, k.shape[3]
    heads, sequences = max(q.shape[2], states), batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = v.new_empty if cu_seqlens is None else v.new_zeros  # no program writes tokens past the last offset
    bits, channels = operand_name(q, k, v), _gate(g) == "channel"
    solved = torch.float16 if bits == "bf16" else torch.float32  # no element is far above |k|^2
    slots = batch * -(-tokens // 64) if cu_seqlens is None else tokens // 64 + sequences
    return (
        new(batch, tokens, heads, value_dim),
        v.new_empty(sequences, states, key_dim, value_dim, dtype=torch.float32),
        v.new_empty(batch, tokens, states, 64, dtype=solved),
        v.new_empty((batch, tokens, states) if normalize else 0, dtype=torch.float32),
        v.new_empty(
            (batch, tokens, heads, 64) if channels else 0, dtype=torch.bfloat16 if bits == "bf16" else torch.float32
        ),
        v.new_empty((slots, states, key_dim) if channels else 0, dtype=torch.int32),
    )


def _readable(q, k, v, g, cu_seqlens) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the tensors in layouts that the kernels can read; a copy is rarely needed."""
    q, k, v = map(_dense, (q, k, v))
    return q, k, v, None if g is None else _dense(g), None if cu_seqlens is None else cu_seqlens.contiguous()


# ------------------------------------------------------------------------------------------------------------- launches
def _solve(q, k, g, beta, saved, heads, cu_seqlens, operands) -> None:
    solved, norms, pairs, hot = (x if x.numel() else None for x in saved)
    states, key_dim = solved.shape[2], k.shape[3]  # pyright: ignore[reportOptionalMemberAccess]
    slots, sequences = _slots(solved, cu_seqlens)
    with launching("linear_attention_solve_chunks", k):
        solve_chunks[(slots * states,)](
            *(_rows(x) for x in (q, k, g, beta, solved, norms, pairs)),
            hot,
            cu_seqlens,
            k.shape[1],
            sequences,
            K=key_dim,
            STATES=states,
            GROUP=heads // states,
            Q_SHARE=heads // q.shape[2],
            K_SHARE=states // k.shape[2],
            G_SHARE=1 if g is None else states // g.shape[2],
            GATE=_gate(g),
            TERMS=_terms(g, operands),
            PRECISION=_precision(operands),
            SOLVE=_solve_precision(operands),
            BLOCK_K=tile_columns(key_dim),
            num_warps=4,
            num_stages=1,
        )


def _sweep(q, k, v, g, y, saved, beta, h, first, last, cu_seqlens, scale) -> None:
    """Compute outputs and final states; or with h, the states before all chunks and r."""
    (_, tokens, heads, value_dim), key_dim, states = y.shape, k.shape[3], v.shape[2]
    operands = operand_name(q, k, v)
    solved, norms, pairs, hot = (x if x.numel() else None for x in saved)
    launch = _launch("sweep_delta", k.device, key_dim, value_dim, operands)
    tma = _describable(launch, cu_seqlens, q, k, v, y, solved, _channel(g))
    with launching(launch.name, y):
        sweep_delta[(_slots(y, cu_seqlens)[1] * heads * triton.cdiv(value_dim, launch.block_v),)](
            *(_tile(x, launch.block_k, tma) for x in (q, k)),
            _tile(v, launch.block_v, tma),
            _gates(g, launch.block_k, tma),
            _tile(y, launch.block_v, tma),
            _tile(solved, 64, tma),
            *(_rows(x) for x in (beta, norms, pairs)),
            h,
            first,
            last,
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            **_constexprs(launch, heads, key_dim, value_dim, g, operands),
            PADDED=0 if h is None else h.stride(2),
            Q_SHARE=heads // q.shape[2],
            K_SHARE=heads // k.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=heads // states,
            SOLVE=_solve_precision(operands),
            STATES=h is not None,
            TMA=tma,
            BLOCK_V=launch.block_v,
        )


def _sweep_back(q, k, g, do, r, dv, saved, beta, dh, dlast, cu_seqlens, scale, operands) -> tuple[Tensor, Tensor]:
    """Compute dv and dh; return the parts of dbeta [B,T,heads,blocks], and the gradients of the initial states."""
    (batch, tokens, heads, value_dim), key_dim, states = do.shape, k.shape[3], beta.shape[2]
    solved, norms, pairs, hot = (x if x.numel() else None for x in saved)
    launch = _launch("sweep_gradients", k.device, key_dim, value_dim, operands)
    blocks = triton.cdiv(value_dim, launch.block_v)
    new = do.new_empty if cu_seqlens is None else do.new_zeros
    dbeta = new(batch, tokens, heads, blocks, dtype=torch.float32)
    dfirst = dlast.new_empty(dlast.shape[0], heads, *dlast.shape[2:])
    tma = _describable(launch, cu_seqlens, q, k, do, r, dv, solved, _channel(g))
    with launching(launch.name, k):
        sweep_gradients[(_slots(do, cu_seqlens)[1] * heads * blocks,)](
            *(_tile(x, launch.block_k, tma) for x in (q, k)),
            _gates(g, launch.block_k, tma),
            *(_tile(x, launch.block_v, tma) for x in (do, r, dv)),
            _rows(dbeta),
            _tile(solved, 64, tma),
            *(_rows(x) for x in (beta, norms, pairs)),
            dh,
            dlast,
            dfirst,
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            **_constexprs(launch, heads, key_dim, value_dim, g, operands),
            PADDED=dh.stride(2),
            Q_SHARE=heads // q.shape[2],
            K_SHARE=heads // k.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=heads // states,
            SOLVE=_solve_precision(operands),
            TMA=tma,
            BLOCK_V=launch.block_v,
        )
    return dbeta, dfirst


def _gradients(q, k, g, do, r, dv, beta, h, dh, saved, cu_seqlens, scale, operands) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and g (empty without gates) for every head of do."""
    (_, tokens, heads, value_dim), key_dim, states = do.shape, k.shape[3], saved[0].shape[2]
    norms, hot = (x if x.numel() else None for x in (saved[1], saved[3]))
    dq, dk = (_gradients_of(x, do, cu_seqlens) for x in (q, k))
    dg = None if g is None else _gradients_of(g, do, cu_seqlens)
    slots, sequences = _slots(do, cu_seqlens)
    with launching("linear_attention_delta_gradients", k):
        delta_gradients[(slots * heads,)](
            *(_rows(x) for x in (q, k, g, do, r, dv, beta, h, dh, dq, dk, dg)),
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            sequences,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            Q_SHARE=heads // q.shape[2],
            K_SHARE=heads // k.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=heads // states,
            GATE=_gate(g),
            TERMS=_terms(g, operands),
            PRECISION=_precision(operands),
            NORMALIZE=norms is not None,
            BLOCK_K=max(16, triton.next_power_of_2(key_dim)),
            num_warps=8,
            num_stages=1,
        )
    return dq, dk, q.new_empty(0) if dg is None else dg


def _solve_precision(operands: str) -> str:
    """Return the precision of products with M: one rounding step less than that of other products."""
    return "tf32" if operands == "bf16" else _precision("fp32")


def _rows(x: Tensor | None) -> tuple | None:
    """Return x [B,T,heads] or [B,T,heads,D] as a tuple: see ``primitives``."""
    return None if x is None else (x, *x.stride()[:3])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    normalize: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute outputs [B,T,max(Hq,Hs),V] in v's dtype and final states, fp32 [N,Hs,K,V]; differentiable once.

    With ``normalize`` the kernels divide queries and keys by ``sqrt(sum of squares + 1e-6)``.
    """
    o, last, *_ = forward(q, k, v, g, beta, scale, normalize, state, cu_seqlens)
    return o, last
