"""The backward kernels and op of softmax attention: weights are recomputed from the log-sum-exp.

Dao, "FlashAttention-2" (2023), algorithm 2, in two passes. In one pass many programs would add to dq with atomics; here
one program writes each gradient, so results are bitwise reproducible. B batch, H key heads, Hq query heads, D key dim,
V value dim.

    P = exp(scores - lse),  delta = rowsum(dO * O) - dlse,  dS = P * (dO V^T - delta),  dV = P^T dO

A program of the first pass has a tile of queries and visits the keys that these attend to. A program of the second pass
has a tile of keys. It visits the queries, of all query heads that share the key head, that attend to these keys. There
scores are computed as K Q^T, so that no tile of scores has to be transposed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.architectures import launching
from ...runtime.opaque_ops import opaque_op
from ..options import BlockMask, Options
from .operands import aligned, arguments, dense, launch_of, tiles_of
from .primitives import LOG2E, load_rows, reached_tile, sequence_of, tile_scores, tile_span, tiles_in_reach, visible


@triton.jit(do_not_specialize=["scale", "softcap", "outer_scale"])
def query_gradients_kernel(
    q,
    k,
    v,
    do,
    o,
    lse,
    dlse,
    dq,
    shift,
    delta,
    dsinks,
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
    outer_scale,
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
    do_batch,
    do_time,
    do_head,
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
    """Compute dq and, for the second pass, ``delta`` and ``shift``, both [B,Hq,Tq].

    ``shift`` is lse in base 2; it is inf for a query without keys, whose weights are then 0. With sinks the kernel also
    computes dsinks [B,Hq,programs], each program's part of the sinks' gradient: the sum over its queries of the sink's
    weight times dlse - rowsum(P * dO V^T). That factor equals -delta, but does not use o: the sum over all tokens would
    accumulate the rounding errors of o.
    """
    ALIBI: tl.constexpr = alibi_slopes is not None  # pyright: ignore[reportAssignmentType]
    factor = 1.0 if SOFTCAP or ALIBI else scale
    tile = tl.program_id(0)
    head, batch = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    row_end = queries  # queries of the tensors
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
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < limit
    t = past + rows
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_slopes + head).to(tl.float32) * LOG2E
    query = load_rows(
        q, batch, q_first + first, head, q_first + queries, q_batch, q_time, q_head, BLOCK_M, D, BLOCK_D, False
    )
    gradient = load_rows(
        do, batch, q_first + first, head, q_first + queries, do_batch, do_time, do_head, BLOCK_M, V, BLOCK_V, False
    )
    place = (batch.to(tl.int64) * row_end + q_first + rows) * HEADS + head
    columns = tl.arange(0, BLOCK_V)
    outputs = tl.load(
        o + place[:, None] * V + columns[None, :], mask=inside[:, None] & (columns < V)[None, :], other=0.0
    )
    log_sum = tl.load(lse + place, mask=inside, other=float("-inf"))
    seen = log_sum > float("-inf")
    row_delta = tl.sum(gradient.to(tl.float32) * outputs.to(tl.float32), 1) - tl.load(dlse + place, inside, 0.0)
    row_delta = tl.where(seen, row_delta, 0.0)
    row_shift = tl.where(seen, log_sum * LOG2E, float("inf"))
    place = (batch.to(tl.int64) * HEADS + head) * row_end + q_first + rows
    tl.store(delta + place, row_delta, mask=inside)
    tl.store(shift + place, row_shift, mask=inside)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)  # mean of dO V^T, weighted by P
    low, high, full_low, full_high = tiles_in_reach(
        first + past, keys, block, block_offsets, LEFT, RIGHT, BLOCK_M, BLOCK_N, BLOCK_SIZE
    )
    for n in tl.range(low, high, num_stages=STAGES):
        start, end = reached_tile(n, keys, key_blocks, BLOCK_N, BLOCK_SIZE)  # pyright: ignore[reportGeneralTypeIssues]
        s = start + tl.arange(0, BLOCK_N)
        masked = (n < full_low) | (n >= full_high)
        key = load_rows(
            k, batch, k_first + start, kv_head, k_first + end, k_batch, k_time, k_head, BLOCK_N, D, BLOCK_D, TMA
        )
        value = load_rows(
            v, batch, k_first + start, kv_head, k_first + end, v_batch, v_time, v_head, BLOCK_N, V, BLOCK_V, TMA
        )
        if PACKED and TMA and masked:  # tokens after the sequence may be NaN, and 0 * NaN is NaN
            key = tl.where((s < end)[:, None], key, 0.0)
            value = tl.where((s < end)[:, None], value, 0.0)
        products = tl.dot(query, key.T, input_precision=PRECISION)
        scores, derivative = tile_scores(products, t[:, None], s[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
        weights = tl.exp2(scores * factor - row_shift[:, None])
        if masked:
            weights = tl.where(visible(t[:, None], s[None, :], end, LEFT, RIGHT), weights, 0.0)
        dweights = tl.dot(gradient, value.T, input_precision=PRECISION)
        if sinks is not None:
            mean += tl.sum(weights * dweights, 1)
        dscores = weights * derivative * (dweights - row_delta[:, None])
        acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)

    place = (batch.to(tl.int64) * row_end + q_first + rows) * HEADS + head
    if sinks is not None:
        sink_weights = tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - row_shift)
        dsink = tl.sum(sink_weights * (tl.load(dlse + place, mask=inside, other=0.0) - mean))
        tl.store(dsinks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), dsink)
    columns = tl.arange(0, BLOCK_D)
    tl.store(
        dq + place[:, None] * D + columns[None, :],
        (acc * outer_scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (columns < D)[None, :],
    )


@triton.jit(do_not_specialize=["scale", "softcap", "outer_scale"])
def key_gradients_kernel(
    q,
    k,
    v,
    do,
    shift,
    delta,
    dk,
    dv,
    alibi_slopes,
    block_offsets,
    query_blocks,
    cu_seqlens_q,
    cu_seqlens_k,
    tiles_sequence,
    tiles_before,
    scale,
    softcap,
    outer_scale,
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
    do_batch,
    do_time,
    do_head,
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
    """Compute dk and dv; ``block_offsets`` and ``query_blocks`` list the live query blocks of every key block."""
    ALIBI: tl.constexpr = alibi_slopes is not None  # pyright: ignore[reportAssignmentType]
    KV_HEADS: tl.constexpr = HEADS // GROUP
    factor = 1.0 if SOFTCAP or ALIBI else scale
    tile = tl.program_id(0)
    kv_head, batch = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    q_end, k_end = queries, keys  # queries and keys of the tensors
    q_first = 0
    k_first = 0
    if PACKED:
        found = sequence_of(tile, tiles_sequence, tiles_before, cu_seqlens_q, cu_seqlens_k)
        tile, q_first, k_first, queries, keys = found  # pyright: ignore[reportGeneralTypeIssues]
    block, start, limit = tile_span(tile, keys, BLOCK_N, BLOCK_SIZE)  # pyright: ignore[reportGeneralTypeIssues]
    if start >= limit:
        return
    position = start - (keys - queries)  # of the tile's first key, in the numbering of queries
    s = position + tl.arange(0, BLOCK_N)
    key = load_rows(
        k, batch, k_first + start, kv_head, k_first + keys, k_batch, k_time, k_head, BLOCK_N, D, BLOCK_D, False
    )
    value = load_rows(
        v, batch, k_first + start, kv_head, k_first + keys, v_batch, v_time, v_head, BLOCK_N, V, BLOCK_V, False
    )
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    low, high, full_low, full_high = tiles_in_reach(
        position, queries, block, block_offsets, RIGHT, LEFT, BLOCK_N, BLOCK_M, BLOCK_SIZE
    )
    for i in tl.range(low * GROUP, high * GROUP, num_stages=STAGES):
        head, m = kv_head * GROUP + i % GROUP, i // GROUP
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi_slopes + head).to(tl.float32) * LOG2E
        row = (batch.to(tl.int64) * HEADS + head) * q_end + q_first
        first, end = reached_tile(m, queries, query_blocks, BLOCK_M, BLOCK_SIZE)  # pyright: ignore[reportGeneralTypeIssues]
        rows = first + tl.arange(0, BLOCK_M)
        masked = (m < full_low) | (m >= full_high)
        query = load_rows(
            q, batch, q_first + first, head, q_first + end, q_batch, q_time, q_head, BLOCK_M, D, BLOCK_D, TMA
        )
        gradient = load_rows(
            do, batch, q_first + first, head, q_first + end, do_batch, do_time, do_head, BLOCK_M, V, BLOCK_V, TMA
        )
        if PACKED and TMA and masked:  # tokens after the sequence may be NaN, and 0 * NaN is NaN
            query = tl.where((rows < end)[:, None], query, 0.0)
            gradient = tl.where((rows < end)[:, None], gradient, 0.0)
        # Queries past the end get weights of 0 from a shift of inf. Rows of keys past the end are not stored.
        products = tl.dot(key, query.T, input_precision=PRECISION)
        scores, derivative = tile_scores(products, rows[None, :], s[:, None], scale, softcap, slope, SOFTCAP, ALIBI)
        row_shift = tl.load(shift + row + rows, mask=rows < end, other=float("inf"))
        weights = tl.exp2(scores * factor - row_shift[None, :])
        if (LEFT is not None or RIGHT is not None) and masked:
            weights = tl.where(visible(rows[None, :], s[:, None], queries, LEFT, RIGHT), weights, 0.0)
        rounded = weights.to(gradient.dtype)
        dweights = tl.dot(value, gradient.T, input_precision=PRECISION)
        row_delta = tl.load(delta + row + rows, mask=rows < end, other=0.0)
        dscores = weights * derivative * (dweights - row_delta[None, :])
        dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
        dvalue = tl.dot(rounded, gradient, dvalue, input_precision=PRECISION)

    rows = start + tl.arange(0, BLOCK_N)
    inside = rows < limit
    place = (batch.to(tl.int64) * k_end + k_first + rows) * KV_HEADS + kv_head
    columns = tl.arange(0, BLOCK_D)
    tl.store(
        dk + place[:, None] * D + columns[None, :],
        (dkey * outer_scale).to(dk.dtype.element_ty),
        mask=inside[:, None] & (columns < D)[None, :],
    )
    columns = tl.arange(0, BLOCK_V)
    tl.store(
        dv + place[:, None] * V + columns[None, :],
        dvalue.to(dv.dtype.element_ty),
        mask=inside[:, None] & (columns < V)[None, :],
    )


@opaque_op("hybridattn::flash_attention_triton_backward")
def backward(
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
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and the sinks (empty without sinks); zeros for tokens of no sequence.

    Args:
        q to cu_seqlens_k: as in ``forward``.
        o, lse: results of ``forward``.
        do, dlse: their gradients.
    """
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv, dsinks = _empty_gradients(q, k, v, sinks)
    shift, delta = q.new_empty(2, batch, heads, queries, dtype=torch.float32)
    if cu_seqlens_q is not None or not queries:
        for x in (dq, dk, dv, delta):
            x.zero_()
        shift.fill_(torch.inf)
    if lse.numel() and not (cu_seqlens_q is not None and cu_seqlens_q.numel() == 1):
        options = Options.of(scale, left, right, alibi_slopes, sinks, softcap, block_offsets, key_blocks, block_size)
        offsets = cu_seqlens_q, cu_seqlens_k
        operands = {"q": aligned(q), "k": aligned(k), "v": aligned(v), "do": aligned(do)}
        launch = launch_of("query_gradients", q, v)
        tiles = tiles_of(queries, launch.block_m, cu_seqlens_q, options.block_mask)
        of_tiles = None if sinks is None else lse.new_zeros(batch, heads, tiles.number)
        with launching(launch.name, q):
            query_gradients_kernel[(tiles.number, batch * heads)](
                **arguments(launch, operands, options, tiles, offsets),
                outer_scale=scale,
                o=o,
                lse=lse,
                dlse=dlse.contiguous(),
                dq=dq,
                shift=shift,
                delta=delta,
                dsinks=of_tiles,
                sinks=dense(sinks),
                block_offsets=dense(block_offsets),
                key_blocks=dense(key_blocks),
            )
        if of_tiles is not None:
            dsinks.copy_(of_tiles.sum((0, 2)))
        if keys:
            launch = launch_of("key_gradients", q, v)
            tiles = tiles_of(keys, launch.block_n, cu_seqlens_k, options.block_mask)
            live = (None, None) if options.block_mask is None else _by_key_block(options.block_mask, keys)
            with launching(launch.name, q):
                key_gradients_kernel[(tiles.number, batch * kv_heads)](
                    **arguments(launch, operands, options, tiles, offsets),
                    outer_scale=scale,
                    shift=shift,
                    delta=delta,
                    dk=dk,
                    dv=dv,
                    block_offsets=live[0],
                    query_blocks=live[1],
                )
    return dq, dk, dv, dsinks


@backward.register_fake
def _(q, k, v, *others):
    return _empty_gradients(q, k, v, others[4])


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_zeros(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _by_key_block(mask: BlockMask, keys: int) -> tuple[Tensor, Tensor]:
    """Return the transposed mask: offsets [key blocks + 1] and, for every key block, its live query blocks, ascending.

    Nothing is read back from the GPU.
    """
    offsets, key_blocks, size = mask.offsets.contiguous(), mask.key_blocks.contiguous(), mask.block_size
    entries = torch.arange(key_blocks.numel(), device=offsets.device, dtype=offsets.dtype)
    query_blocks = torch.searchsorted(offsets, entries, right=True) - 1
    sorted_blocks, order = key_blocks.sort(stable=True)
    starts = torch.arange(-(-keys // size) + 1, device=offsets.device, dtype=key_blocks.dtype)
    return torch.searchsorted(sorted_blocks, starts), query_blocks[order]
