"""Device functions of the softmax-attention kernels: loads, scores, visibility, bounds of tiles and sequences."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # start of a running maximum: finite, so that no difference is NaN


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
    """Load tokens first .. first + ROWS - 1 of a head, [ROWS,BLOCK]; zeros from token ``limit`` and column DIM on.

    x is a pointer to [B,T,H,DIM], or a descriptor of it with blocks [1,ROWS,1,BLOCK]. With a descriptor the tokens from
    ``limit`` on are not masked; zeros start at the end of the tensor.
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
    """Compute scores from products q.k, and the derivative of the softcap (1 without a softcap).

    t and s, the positions of queries and keys, broadcast to the tile. With a softcap or slopes the scores are in base
    2. Without both, the caller still has to multiply them by ``scale``. With a softcap, ``scale`` is the factor in the
    exponent of the tanh.
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
    """Return whether causality and window let the query at position t attend to the key at s; ``keys`` bounds s."""
    seen = s < keys
    if RIGHT is not None:
        seen = seen & (s <= t + RIGHT)
    if LEFT is not None:
        seen = seen & (s >= t - LEFT)
    return seen


@triton.jit
def sequence_of(tile, tiles_sequence, tiles_before, cu_seqlens_q, cu_seqlens_k):
    """Return a tile's number within its sequence, and the sequence's first query, first key and numbers of both.

    ``packed_tiles`` numbers the tiles of a packed row; surplus tiles have no queries.
    """
    n = tl.load(tiles_sequence + tile)
    q_first, k_first = tl.load(cu_seqlens_q + n).to(tl.int32), tl.load(cu_seqlens_k + n).to(tl.int32)
    queries = tl.load(cu_seqlens_q + n + 1).to(tl.int32) - q_first
    keys = tl.load(cu_seqlens_k + n + 1).to(tl.int32) - k_first
    return tile - tl.load(tiles_before + n), q_first, k_first, queries, keys


@triton.jit
def tile_span(tile, tokens, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the mask block of a tile of BLOCK tokens, the tile's first token, and the limit of its tokens.

    A tile never extends past a block of the block mask. Without a block mask (BLOCK_SIZE None) the block is 0.
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
    """Return the ranges [low, high) and [full_low, full_high) of tiles of BLOCK tokens for ROWS rows from ``first`` on.

    A row reaches from BEFORE tokens before its position to AFTER tokens after it; None is unlimited. ``first`` is the
    position of the first row among the tokens. Tiles in [low, high) contain a token that some row reaches. Tiles in
    [full_low, full_high) are full, and all rows reach all of their tokens: they need no mask. With a block mask the
    tiles number those of the live blocks, and the second range is empty.
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
    """Return the first token of the n-th tile of ``tiles_in_reach`` and the limit of its tokens."""
    first = n * BLOCK
    limit = tokens
    if BLOCK_SIZE is not None:
        tiles: tl.constexpr = (BLOCK_SIZE + BLOCK - 1) // BLOCK
        block = tl.load(blocks + n // tiles).to(tl.int32) * BLOCK_SIZE
        first = block + n % tiles * BLOCK
        if BLOCK_SIZE % BLOCK:
            limit = tl.minimum(block + BLOCK_SIZE, tokens)
    return first, limit
