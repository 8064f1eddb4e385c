"""The forward kernel and op of softmax attention: a program per tile of queries loops over tiles of keys.

Dao, "FlashAttention-2" (2023), section 3.1. B batch, H key heads, Hq query heads, D key dim, V value dim. A program has
BLOCK_M queries of one head and visits the key tiles that some of these queries attend to. It masks only tiles that some
query attends to in part. With a block mask it visits the live blocks of its query block. Maxima and sums are in base 2;
the division by the sum follows after the loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.architectures import launching
from ...runtime.opaque_ops import opaque_op
from ..options import Options
from .backward import backward
from .operands import aligned, arguments, dense, launch_of, tiles_of
from .primitives import (
    LN2,
    LOG2E,
    LOWEST,
    load_rows,
    reached_tile,
    sequence_of,
    tile_scores,
    tile_span,
    tiles_in_reach,
    visible,
)


# ``scale`` is never specialised: ptxas 12.8 miscompiles some kernels for sm_90 if it is the constant 1.
@triton.jit(do_not_specialize=["scale", "softcap"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    alibi_slopes,
    sinks,
    block_offsets,
    key_blocks,
    cu_seqlens_q,
    cu_seqlens_k,
    tiles_sequence,
    tiles_before,
    scale,
    softcap,
    queries,
    keys,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    v_batch,
    v_time,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    ALIBI: tl.constexpr = alibi_slopes is not None  # pyright: ignore[reportAssignmentType]
    factor = 1.0 if SOFTCAP or ALIBI else scale  # applied to scores where the maximum is subtracted, at no cost
    tile = tl.program_id(0)
    head, batch = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    row_end = queries  # queries of the tensors o and lse
    q_first = 0
    k_first = 0
    if PACKED:
        found = sequence_of(tile, tiles_sequence, tiles_before, cu_seqlens_q, cu_seqlens_k)
        tile, q_first, k_first, queries, keys = found  # pyright: ignore[reportGeneralTypeIssues]
    elif RIGHT is not None:
        tile = tl.num_programs(0) - 1 - tile  # tiles with the most keys first
    kv_head = head // GROUP
    block, first, limit = tile_span(tile, queries, BLOCK_M, BLOCK_SIZE)  # pyright: ignore[reportGeneralTypeIssues]
    if first >= limit:
        return
    past = keys - queries
    t = first + past + tl.arange(0, BLOCK_M)

    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_slopes + head).to(tl.float32) * LOG2E
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
        total += tl.exp2(sink - top)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    query = load_rows(
        q, batch, q_first + first, head, q_first + queries, q_batch, q_time, q_head, BLOCK_M, D, BLOCK_D, False
    )

    low, high, full_low, full_high = tiles_in_reach(
        first + past, keys, block, block_offsets, LEFT, RIGHT, BLOCK_M, BLOCK_N, BLOCK_SIZE
    )
    for n in tl.range(low, high, num_stages=STAGES):
        start, end = reached_tile(n, keys, key_blocks, BLOCK_N, BLOCK_SIZE)  # pyright: ignore[reportGeneralTypeIssues]
        key = load_rows(
            k, batch, k_first + start, kv_head, k_first + end, k_batch, k_time, k_head, BLOCK_N, D, BLOCK_D, TMA
        )
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        s = start + tl.arange(0, BLOCK_N)
        scores, _ = tile_scores(scores, t[:, None], s[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
        masked = (n < full_low) | (n >= full_high)
        if masked:
            scores = tl.where(visible(t[:, None], s[None, :], end, LEFT, RIGHT), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - higher[:, None])
        kept = tl.exp2(top - higher)
        total = total * kept + tl.sum(weights, 1)
        value = load_rows(
            v, batch, k_first + start, kv_head, k_first + end, v_batch, v_time, v_head, BLOCK_N, V, BLOCK_V, TMA
        )
        if PACKED and TMA and masked:  # tokens after the sequence may be NaN, and 0 * NaN is NaN
            value = tl.where((s < end)[:, None], value, 0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * kept[:, None], input_precision=PRECISION)
        top = higher

    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_V)
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    place = (batch.to(tl.int64) * row_end + q_first + rows) * HEADS + head
    acc = acc / total[:, None]
    inside = rows < limit
    tl.store(
        o + place[:, None] * V + columns[None, :],
        acc.to(o.dtype.element_ty),
        mask=inside[:, None] & (columns < V)[None, :],
    )
    tl.store(lse + place, tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf")), mask=inside)


@opaque_op("hybridattn::flash_attention_triton")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    block_offsets: Tensor | None,
    key_blocks: Tensor | None,
    block_size: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o [B,Tq,Hq,V] in v's dtype and lse [B,Tq,Hq] in fp32; zeros and -inf for queries of no sequence.

    Args:
        q, k, v: [B,Tq,Hq,D], [B,Tk,H,D], [B,Tk,H,V].
        scale to block_size: the values of ``Options.flat``.
        cu_seqlens_q, cu_seqlens_k: offsets of packed sequences [N+1], or None.
    """
    batch, queries, heads, _ = q.shape
    o, lse = v.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, queries, heads, dtype=torch.float32)
    if cu_seqlens_q is not None:
        o.zero_()
        lse.fill_(-torch.inf)
    if not lse.numel() or (cu_seqlens_q is not None and cu_seqlens_q.numel() == 1):
        return o, lse
    if scale <= 0:  # the kernel takes the maximum before it applies the scale
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    options = Options.of(scale, left, right, alibi_slopes, sinks, softcap, block_offsets, key_blocks, block_size)
    launch = launch_of("forward", q, v)
    tiles = tiles_of(queries, launch.block_m, cu_seqlens_q, options.block_mask)
    operands = {"q": aligned(q), "k": aligned(k), "v": aligned(v)}
    with launching(launch.name, q):
        forward_kernel[(tiles.number, batch * heads)](
            **arguments(launch, operands, options, tiles, (cu_seqlens_q, cu_seqlens_k)),
            o=o,
            lse=lse,
            sinks=dense(sinks),
            block_offsets=dense(block_offsets),
            key_blocks=dense(key_blocks),
        )
    return o, lse


@forward.register_fake
def _(q, k, v, *_):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


def _backward(ctx, do, dlse):
    *tensors, o, lse = ctx.saved_tensors
    inputs = [number if x is None else x for x, number in zip(tensors, ctx.numbers, strict=True)]
    do, dlse = torch.zeros_like(o) if do is None else do, torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dsinks = backward(*inputs, o, lse, do, dlse)
    return dq, dk, dv, *[None] * 4, dsinks if dsinks.numel() else None, *[None] * 6


forward.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute o [B,Tq,Hq,V] in v's dtype and lse [B,Tq,Hq] in fp32; differentiable once."""
    return forward(q, k, v, *options.flat(), cu_seqlens_q, cu_seqlens_k)
