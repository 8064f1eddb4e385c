"""What hot channels add to the scores of their own chunk, which the sweeps leave out: see ``forward``.

A pair of tokens s < t lies in sibling halves of exactly one block of 2, 4, .., 64 tokens. With m the last token of its
left half, 2^(b_t - b_s) = 2^(b_t - b_m) 2^(b_m - b_s): both factors are at most 1, whatever the gates. So six products
per 64 channels give all scores; the diagonal has no decay. Gates from the middle to a token are a product with a 0/1
matrix, as everywhere. One program per chunk and head, which ends at once where no channel is hot.
"""

# pyright: reportGeneralTypeIssues=false
# It takes jit functions for ones that never return.

import triton
import triton.language as tl

from .primitives import bounded, find_sequence, load_tile, operand, product, store_tile, sums_of_rows


@triton.jit
def find_chunk(hot, cu_seqlens, T, K: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """Sequence (-1 where nothing is hot), row of the batch, first token and end of the sequence, head, and flags of
    the chunk and head that are this program's."""
    head, flags, channel = tl.program_id(0) % HEADS, hot + tl.program_id(0).to(tl.int64) * K, tl.arange(0, KEYS)
    n = tl.max(tl.load(flags + channel, mask=channel < K, other=0), 0) - 1
    batch, start, end, slot = find_sequence(cu_seqlens, tl.maximum(n, 0), T)
    return n, batch, start + (tl.program_id(0) // HEADS - slot) * 64, end, head, flags


@triton.jit
def halves(LEVEL: tl.constexpr):
    """For blocks of 2^(LEVEL + 1) tokens: [64] right half or not, [64,64] gates from the middle to the row, pairs."""
    t = tl.arange(0, 64)
    block, middle = t >> (LEVEL + 1), ((t >> (LEVEL + 1)) << (LEVEL + 1)) + 2**LEVEL - 1
    right = t > middle
    before, after = tl.minimum(t, middle)[:, None], tl.maximum(t, middle)[:, None]
    return right, (t[None, :] > before) & (t[None, :] <= after), block[:, None] == block[None, :]


@triton.jit(do_not_specialize=["scale"])
def repair_values(
    q,  # [B,T,*,K], like k, v and g a tuple: see ``primitives``
    k,  # [B,T,*,K]
    v,  # [B,T,*,V]
    g,  # [B,T,*,K]
    o,  # [B,T,HEADS,V], added to
    hot,  # int32 [slots,HEADS,K]
    cu_seqlens,
    scale,
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,  # the power of two that holds K
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n, batch, row, end, head, flags = find_chunk(hot, cu_seqlens, T, K, HEADS, KEYS)
    if n < 0:
        return
    t = tl.arange(0, 64)
    scores = tl.zeros([64, 64], tl.float32)
    for i in range(0, K, BLOCK_K):
        channel = i + tl.arange(0, BLOCK_K)
        is_hot = tl.load(flags + channel, mask=channel < K, other=0)[None, :] > 0
        gt = bounded(load_tile(g, batch, row, head // G_SHARE, i, end, K, BLOCK_K, False))
        kt = tl.where(is_hot, load_tile(k, batch, row, head // K_SHARE, i, end, K, BLOCK_K, False).to(tl.float32), 0.0)
        qt = load_tile(q, batch, row, head // Q_SHARE, i, end, K, BLOCK_K, False).to(tl.float32) * scale
        scores += tl.where(t[:, None] == t[None, :], tl.sum(qt * kt, 1)[:, None], 0.0)
        for level in tl.static_range(6):
            right, reach, same = halves(level)
            x = tl.where(right[:, None], tl.where(is_hot, qt, 0.0), kt) * tl.exp2(sums_of_rows(reach, gt, TERMS))
            x = operand(x, PRECISION)
            pairs = product(x, tl.trans(x), tl.zeros([64, 64], tl.float32), PRECISION)
            scores += tl.where(same & right[:, None] & (right == 0)[None, :], pairs, 0.0)
    scores = operand(scores, PRECISION)
    for j in range(0, V, BLOCK_V):
        vt = load_tile(v, batch, row, head // V_SHARE, j, end, V, BLOCK_V, False)
        ot = load_tile(o, batch, row, head, j, end, V, BLOCK_V, False).to(tl.float32)
        ot = product(scores, vt, ot, PRECISION)
        store_tile(o, ot, batch, row, head, j, end, V, BLOCK_V, False)
