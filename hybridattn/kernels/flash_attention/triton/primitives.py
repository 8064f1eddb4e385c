"""What the softmax-attention kernels share: rows of a head, scores of a tile, sequences of a packed row."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a maximum of nothing: a number, so that no difference of two is NaN


@triton.jit
def load_rows(
    x,
    batch,
    first,
    head,
    limit,
    batch_stride,
    time_stride,
    head_stride,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tokens first .. first + ROWS - 1 of a head, [ROWS,BLOCK]: zeros from ``limit`` and DIM on.

    x is a pointer to [B,T,H,DIM], or a descriptor of it with blocks [1,ROWS,1,BLOCK]. A descriptor gives what follows
    ``limit`` as it is; zeros only from the tensor's own end on.
    """
    if TMA:
        place = [tl.cast(batch, tl.int32), tl.cast(first, tl.int32), tl.cast(head, tl.int32), 0]
        tile = x.load(place).reshape(ROWS, BLOCK)
    else:
        rows, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        start = x + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        inside = (rows < limit)[:, None] & (columns < DIM)[None, :]
        tile = tl.load(start + rows.to(tl.int64)[:, None] * time_stride + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def tile_scores(scores, t, s, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores from products q.k of queries at positions t with keys at s, which broadcast.

    In base 2 where there is a softcap or slopes; else still to be multiplied by ``scale``. With a softcap, ``scale`` is
    that of the exponent of its tanh.
    """
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp 2x)
        scores = softcap - 2 * softcap / (1 + tl.exp2(scores * scale))
    elif ALIBI:
        scores = scores * scale
    if ALIBI:
        scores -= slope * tl.abs(t - s).to(tl.float32)
    return scores


@triton.jit
def visible(t, s, keys, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """May the query at position t see the key at s, of so many?"""
    seen = s < keys
    if RIGHT is not None:
        seen = seen & (s <= t + RIGHT)
    if LEFT is not None:
        seen = seen & (s >= t - LEFT)
    return seen


@triton.jit
def sequence_of(tile, tiles_sequence, tiles_before, cu_seqlens_q, cu_seqlens_k):
    """Of a tile of a packed row: its number in its sequence, the sequence's first query and first key, and its lengths.

    See ``packed_tiles``; tiles beyond the last one have no queries.
    """
    n = tl.load(tiles_sequence + tile)
    q_first, k_first = tl.load(cu_seqlens_q + n).to(tl.int32), tl.load(cu_seqlens_k + n).to(tl.int32)
    queries = tl.load(cu_seqlens_q + n + 1).to(tl.int32) - q_first
    keys = tl.load(cu_seqlens_k + n + 1).to(tl.int32) - k_first
    return tile - tl.load(tiles_before + n), q_first, k_first, queries, keys
