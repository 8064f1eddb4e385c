"""Softmax attention, forward: tiles of queries in parallel, tiles of keys one after the other, one division at the end.

Dao, "FlashAttention-2" (2023), section 3.1. B batch, H key heads, Hq query heads, D key dim, V value dim. A program has
BLOCK_M queries of one head and visits the key tiles that some of them may see; only those at the edges of what they see
are masked. With a block mask it visits the live blocks of its query block. Maxima and sums are in base 2.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ...runtime.launch import architecture, warn_of_launch
from .. import blocked
from ..options import Options
from .launch import ForwardLaunch, forward_launch
from .operands import aligned, operand, packed_tiles, score_numbers
from .primitives import LN2, LOG2E, LOWEST, load_rows, sequence_of, tile_scores, visible


# ``scale`` is a float that is never specialised: ptxas 12.8 miscompiles some kernels for sm_90 where it becomes 1.
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
    factor = 1.0 if SOFTCAP or ALIBI else scale  # of scores, where it costs nothing: a maximum is taken off
    tile = tl.program_id(0)
    head, batch = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    row_end = queries  # of the tensors o and lse
    q_first = 0
    k_first = 0
    if PACKED:
        found = sequence_of(tile, tiles_sequence, tiles_before, cu_seqlens_q, cu_seqlens_k)
        tile, q_first, k_first, queries, keys = found  # pyright: ignore[reportGeneralTypeIssues]
    elif RIGHT is not None:
        tile = tl.num_programs(0) - 1 - tile  # the longest first
    kv_head = head // GROUP
    limit = queries
    first = tile * BLOCK_M
    if BLOCK_SIZE is not None:  # tiles do not reach over query blocks
        tiles: tl.constexpr = (BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
        query_block = tile // tiles
        first = query_block * BLOCK_SIZE + tile % tiles * BLOCK_M
        limit = tl.minimum(query_block * BLOCK_SIZE + BLOCK_SIZE, queries)
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
        q, batch, q_first + first, head, q_first + queries, q_batch, q_time, q_head, BLOCK_M, D, BLOCK_D, TMA
    )
    if PACKED and TMA:  # other sequences' queries, or nobody's: computed along, but not with what may be NaN
        query = tl.where((first + tl.arange(0, BLOCK_M) < limit)[:, None], query, 0.0)

    # Tiles [low, high) hold keys that some query sees; those of [full_low, full_high) are seen whole by all of them.
    low = 0
    high = tl.cdiv(keys, BLOCK_N)
    full_low = 0
    full_high = keys // BLOCK_N
    if BLOCK_SIZE is not None:
        per_block: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
        low = tl.load(block_offsets + query_block).to(tl.int32) * per_block
        high = tl.load(block_offsets + query_block + 1).to(tl.int32) * per_block
        full_high = 0
    else:
        if LEFT is not None:
            low = tl.maximum(first + past - LEFT, 0) // BLOCK_N
            full_low = tl.cdiv(tl.maximum(first + BLOCK_M - 1 + past - LEFT, 0), BLOCK_N)
        if RIGHT is not None:
            high = tl.minimum(high, tl.cdiv(tl.maximum(first + BLOCK_M + past + RIGHT, 0), BLOCK_N))
            full_high = tl.minimum(full_high, tl.maximum(first + past + RIGHT + 1, 0) // BLOCK_N)
    for n in tl.range(low, high, num_stages=STAGES):
        start = n * BLOCK_N
        end = keys
        if BLOCK_SIZE is not None:
            block = tl.load(key_blocks + n // per_block).to(tl.int32) * BLOCK_SIZE
            start = block + n % per_block * BLOCK_N
            end = tl.minimum(block + BLOCK_SIZE, keys)
        key = load_rows(
            k, batch, k_first + start, kv_head, k_first + end, k_batch, k_time, k_head, BLOCK_N, D, BLOCK_D, TMA
        )
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        s = start + tl.arange(0, BLOCK_N)
        scores = tile_scores(scores, t[:, None], s[None, :], scale, softcap, slope, SOFTCAP, ALIBI)
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
        if PACKED and TMA and masked:  # a weight of 0 does not undo a NaN of what follows the sequence
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


@custom_op("hybridattn::flash_attention_triton", mutates_args=())
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
    """o [B,Tq,Hq,V] in v's dtype and lse [B,Tq,Hq] in fp32; zeros and -inf for queries of no sequence.

    After q, k and v come ``Options.flat`` and the offsets of packed sequences.
    """
    batch, queries, heads, key_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    packed = cu_seqlens_q is not None
    o, lse = v.new_empty(batch, queries, heads, value_dim), q.new_empty(batch, queries, heads, dtype=torch.float32)
    if packed:
        o.zero_()
        lse.fill_(-torch.inf)
    if not lse.numel() or (cu_seqlens_q is not None and cu_seqlens_q.numel() == 1):
        return o, lse
    launch = _launch(q.device, key_dim, value_dim, 8 * q.itemsize)
    if scale <= 0:  # maxima are taken before the scale
        q, scale = q * scale, 1.0
    if not keys:  # a descriptor is of something
        k, v = (x.new_zeros(batch, 1, *x.shape[2:]) for x in (k, v))
    q, k, v = map(aligned, (q, k, v))
    tables = packed_tiles(cu_seqlens_q, launch.block_m, queries) if cu_seqlens_q is not None else (None, None)
    if tables[0] is not None:
        tiles = len(tables[0])
    elif block_size is None:
        tiles = triton.cdiv(queries, launch.block_m)
    else:
        tiles = triton.cdiv(queries, block_size) * triton.cdiv(block_size, launch.block_m)
    forward_kernel[(tiles, batch * heads)](
        operand(q, launch.tma, launch.block_m, launch.block_d),
        operand(k, launch.tma, launch.block_n, launch.block_d),
        operand(v, launch.tma, launch.block_n, launch.block_v),
        o,
        lse,
        alibi_slopes,
        sinks,
        block_offsets,
        key_blocks,
        cu_seqlens_q,
        cu_seqlens_k,
        *tables,
        *score_numbers(scale, softcap),
        queries,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        **forward_constexprs(launch, key_dim, value_dim),
        HEADS=heads,
        GROUP=heads // kv_heads,
        LEFT=left,
        RIGHT=right,
        SOFTCAP=softcap is not None,
        BLOCK_SIZE=block_size,
        PACKED=packed,
        num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
    )
    return o, lse


@forward.register_fake
def _(q, k, v, *_):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def forward_constexprs(launch: ForwardLaunch, key_dim: int, value_dim: int) -> dict[str, int | str]:
    """Those of the kernel's constexprs that dims and launch row decide."""
    return {
        "D": key_dim,
        "V": value_dim,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": launch.block_d,
        "BLOCK_V": launch.block_v,
        "TMA": launch.tma,
        "PRECISION": launch.precision,
        "STAGES": launch.num_stages,
    }


@cache
def _launch(device: torch.device, key_dim: int, value_dim: int, bits: int) -> ForwardLaunch:
    """The launch row, with what has to be said about it said."""
    name = architecture(device)
    launch = forward_launch(name, key_dim, value_dim, bits)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


def _backward(ctx, do, dlse):
    *tensors, o, lse = ctx.saved_tensors
    q, k, v, *others = [number if x is None else x for x, number in zip(tensors, ctx.numbers, strict=True)]
    do, dlse = torch.zeros_like(o) if do is None else do, torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dsinks = blocked.backward(q, k, v, None, None, *others, o, lse, do, dlse)
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
    """o [B,Tq,Hq,V] in v's dtype and lse [B,Tq,Hq], differentiable once."""
    return forward(q, k, v, *options.flat(), cu_seqlens_q, cu_seqlens_k)
