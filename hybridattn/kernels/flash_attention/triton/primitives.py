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
def tile_scores(products, t, s, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores from products q.k of queries at positions t with keys at s, which broadcast, and what the softcap's
    derivative makes of ``scale``: 1 without one.

    Scores are in base 2 where there is a softcap or slopes; else still to be multiplied by ``scale``. With a softcap,
    ``scale`` is that of the exponent of its tanh.
    """
    scores = products
    derivative = 1.0
    if SOFTCAP:  # tanh(x) = 1 - 2 r and 1 - tanh(x)^2 = 4 r (1 - r), with r = 1 / (1 + exp 2x)
        r = 1 / (1 + tl.exp2(products * scale))
        scores = softcap - 2 * softcap * r
        derivative = 4 * r * (1 - r)
    elif ALIBI:
        scores = products * scale
    if ALIBI:
        scores -= slope * tl.abs(t - s).to(tl.float32)
    return scores, derivative


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


@triton.jit
def tile_span(tile, tokens, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The mask's block that a tile of BLOCK tokens is in, its first token, and where it ends at the latest.

    Tiles do not reach over blocks of a block mask; without one (BLOCK_SIZE None) they are in block 0.
    """
    block = 0
    first = tile * BLOCK
    limit = tokens
    if BLOCK_SIZE is not None:
        tiles: tl.constexpr = (BLOCK_SIZE + BLOCK - 1) // BLOCK
        block = tile // tiles
        first = block * BLOCK_SIZE + tile % tiles * BLOCK
        if BLOCK_SIZE % BLOCK:
            limit = tl.minimum(block * BLOCK_SIZE + BLOCK_SIZE, tokens)
    return block, first, limit


@triton.jit
def tiles_in_reach(
    first,
    tokens,
    block,
    offsets,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Of tiles of BLOCK tokens: [low, high) meet the reach of some of ROWS rows at ``first`` and after, and those of
    [full_low, full_high) are whole and within the reach of all of them.

    A row reaches from BEFORE tokens before its own position to AFTER behind it; ``first`` counts in the positions of
    the tokens. With a block mask the tiles are those of the live blocks, and none counts as within all reach.
    """
    low = 0
    high = tl.cdiv(tokens, BLOCK)
    full_low = 0
    full_high = tokens // BLOCK
    if BLOCK_SIZE is not None:
        tiles: tl.constexpr = (BLOCK_SIZE + BLOCK - 1) // BLOCK
        low = tl.load(offsets + block).to(tl.int32) * tiles
        high = tl.load(offsets + block + 1).to(tl.int32) * tiles
        full_high = 0
    else:
        if BEFORE is not None:
            low = tl.maximum(first - BEFORE, 0) // BLOCK
            full_low = tl.cdiv(tl.maximum(first + ROWS - 1 - BEFORE, 0), BLOCK)
        if AFTER is not None:
            high = tl.minimum(high, tl.cdiv(tl.maximum(first + ROWS + AFTER, 0), BLOCK))
            full_high = tl.minimum(full_high, tl.maximum(first + AFTER + 1, 0) // BLOCK)
    return low, high, full_low, full_high


@triton.jit
def reached_tile(n, tokens, blocks, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Of the n-th tile of ``tiles_in_reach``: its first token, and where it ends at the latest."""
    first = n * BLOCK
    limit = tokens
    if BLOCK_SIZE is not None:
        tiles: tl.constexpr = (BLOCK_SIZE + BLOCK - 1) // BLOCK
        block = tl.load(blocks + n // tiles).to(tl.int32) * BLOCK_SIZE
        first = block + n % tiles * BLOCK
        if BLOCK_SIZE % BLOCK:
            limit = tl.minimum(block + BLOCK_SIZE, tokens)
    return first, limit
