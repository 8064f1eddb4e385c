"""Kernels that add the contribution of hot channels to the scores of their own chunk, which the sweeps leave out.

``forward`` defines hot channels. A pair of tokens s < t lies in different halves of exactly one block of 2, 4, .., or
64 tokens. With m the last token of the block's left half, 2^(b_t - b_s) = 2^(b_t - b_m) 2^(b_m - b_s). Both factors are
at most 1 for any gates. So six matrix products per 64 channels, one per block size, give all scores. The diagonal has
no decay. The sum of the gates from the middle to a token is a product with a 0/1 matrix, as in the other kernels.

Each chunk and head has one program, which returns at once if no channel is hot.
"""

# pyright: reportGeneralTypeIssues=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .primitives import bounded, find_sequence, gate_sums, load_tile, operand, product, store_tile, sums_of_rows


@triton.jit
def find_chunk(hot, cu_seqlens, T, K: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """Find the chunk and head of this program.

    Returns the sequence (-1 if no channel is hot) and its batch row; the first token of the chunk and the end of the
    sequence; the head; and a pointer to the flags of this chunk and head.
    """
    head, flags, channel = tl.program_id(0) % HEADS, hot + tl.program_id(0).to(tl.int64) * K, tl.arange(0, KEYS)
    n = tl.max(tl.load(flags + channel, mask=channel < K, other=0), 0) - 1
    batch, start, end, slot = find_sequence(cu_seqlens, tl.maximum(n, 0), T, 1)
    return n, batch, start + (tl.program_id(0) // HEADS - slot) * 64, end, head, flags


@triton.jit
def halves(level):
    """Return three masks for blocks of 2^(level + 1) tokens.

    [64]: whether a token is in the right half of its block. [64,64]: the gates (columns) between the block's middle
    and the row's token. [64,64]: the pairs of tokens in different halves of the same block.
    """
    t = tl.arange(0, 64)
    block = t >> (level + 1)
    middle = (block << (level + 1)) + (1 << level) - 1
    right = t > middle
    before, after = tl.minimum(t, middle)[:, None], tl.maximum(t, middle)[:, None]
    siblings = (block[:, None] == block[None, :]) & (right[:, None] != right[None, :])
    return right, (t[None, :] > before) & (t[None, :] <= after), siblings


@triton.jit
def hot_scores(
    q,
    q_head,
    k,
    k_head,
    g,
    g_head,
    flags,  # of the chunk's channels
    batch,
    row,
    end,
    scale,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the contribution of hot channels to scale * scores [64 queries,64 keys]; zeros where the key is later.

    With REVERSE the roles of q and k are exchanged: the rows belong to the earlier tokens.
    """
    t = tl.arange(0, 64)
    scores = tl.zeros([64, 64], tl.float32)
    for i in range(0, K, BLOCK_K):
        channel = i + tl.arange(0, BLOCK_K)
        is_hot = tl.load(flags + channel, mask=channel < K, other=0)[None, :] > 0
        gt = bounded(load_tile(g, batch, row, g_head, i, end, K, BLOCK_K, False))
        kt = tl.where(is_hot, load_tile(k, batch, row, k_head, i, end, K, BLOCK_K, False).to(tl.float32), 0.0)
        qt = load_tile(q, batch, row, q_head, i, end, K, BLOCK_K, False).to(tl.float32) * scale
        scores += tl.where(t[:, None] == t[None, :], tl.sum(qt * kt, 1)[:, None], 0.0)
        for level in range(6):
            right, reach, siblings = halves(level)
            x = tl.where(right[:, None], tl.where(is_hot, qt, 0.0), kt) * tl.exp2(gate_sums(reach, gt, TERMS))
            x = operand(x, PRECISION)
            pairs = product(x, tl.trans(x), tl.zeros([64, 64], tl.float32), PRECISION)
            later = tl.where(REVERSE, t[None, :] > t[:, None], t[:, None] > t[None, :])
            scores += tl.where(siblings & later, pairs, 0.0)
    return scores


@triton.jit(do_not_specialize=["scale"])
def repair_values(
    q,  # [B,T,*,K]; q to y are tuples: see ``primitives``
    k,  # [B,T,*,K]
    u,  # v [B,T,*,V]; with REVERSE the gradient of o
    g,  # [B,T,*,K]
    y,  # o [B,T,HEADS,V], to which the kernel adds; with REVERSE the gradient of v
    hot,  # flags of hot channels, int32 [slots,HEADS,K]
    cu_seqlens,
    scale,
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    U_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    KEYS: tl.constexpr,  # least power of two >= K
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n, batch, row, end, head, flags = find_chunk(hot, cu_seqlens, T, K, HEADS, KEYS)
    if n < 0:
        return
    scores = hot_scores(
        q,
        head // Q_SHARE,
        k,
        head // K_SHARE,
        g,
        head // G_SHARE,
        flags,
        batch,
        row,
        end,
        scale,
        K,
        TERMS,
        PRECISION,
        REVERSE,
        BLOCK_K,
    )
    scores = operand(scores, PRECISION)
    for j in range(0, V, BLOCK_V):
        ut = load_tile(u, batch, row, head // U_SHARE, j, end, V, BLOCK_V, False)
        yt = load_tile(y, batch, row, head, j, end, V, BLOCK_V, False).to(tl.float32)
        yt = product(scores, ut, yt, PRECISION)
        store_tile(y, yt, batch, row, head, j, end, V, BLOCK_V, False)


@triton.jit(do_not_specialize=["scale"])
def repair_keys(
    q,  # [B,T,*,K]; q to dg are tuples: see ``primitives``
    k,  # [B,T,*,K]
    v,  # [B,T,*,V]
    g,  # [B,T,*,K]
    do,  # [B,T,HEADS,V]
    dq,  # [B,T,HEADS,K]; the kernel adds to dq, dk and dg
    dk,
    dg,
    hot,  # flags of hot channels, int32 [slots,HEADS,K]
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
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the gradients of q, k and g through the scores of hot channels.

    A score is the product of two rows x, one of each half. Each row's gradient is the score's gradient times the other
    row. The gradient of every gate between them is the score times its gradient. The kernel makes the matrix of the
    scores' gradients symmetric, so that one product per level gives the gradients of both halves.
    """
    n, batch, row, end, head, flags = find_chunk(hot, cu_seqlens, T, K, HEADS, KEYS)
    if n < 0:
        return
    parts: tl.constexpr = 3 if PRECISION == "tf32x3" or PRECISION == "ieee" else 2
    t = tl.arange(0, 64)
    dA, dA_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    for j in range(0, V, BLOCK_V):
        vt = load_tile(v, batch, row, head // V_SHARE, j, end, V, BLOCK_V, False)
        dot = load_tile(do, batch, row, head, j, end, V, BLOCK_V, False)
        dA = product(dot, tl.trans(vt), dA, PRECISION)
        dA_turned = product(vt, tl.trans(dot), dA_turned, PRECISION)
    later = t[:, None] > t[None, :]
    dA = tl.where(later, dA, tl.where(t[:, None] == t[None, :], dA, dA_turned)) * scale
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dA, 0.0), 1)[:, None]
    for i in range(0, K, BLOCK_K):
        channel = i + tl.arange(0, BLOCK_K)
        is_hot = tl.load(flags + channel, mask=channel < K, other=0)[None, :] > 0
        gt = bounded(load_tile(g, batch, row, head // G_SHARE, i, end, K, BLOCK_K, False))
        kt = load_tile(k, batch, row, head // K_SHARE, i, end, K, BLOCK_K, False).to(tl.float32)
        qt = load_tile(q, batch, row, head // Q_SHARE, i, end, K, BLOCK_K, False).to(tl.float32)
        dqt, dkt, dgt = diagonal * kt, diagonal * qt, tl.zeros([64, BLOCK_K], tl.float32)
        for level in range(6):
            right, reach, siblings = halves(level)
            factor = tl.exp2(gate_sums(reach, gt, TERMS))
            x = tl.where(right[:, None], qt, kt) * factor
            dx = operand(tl.where(siblings, dA, 0.0), PRECISION)
            dx = product(dx, operand(x, PRECISION), tl.zeros([64, BLOCK_K], tl.float32), PRECISION)
            dgt = sums_of_rows(tl.trans(reach), x * dx, dgt, parts)
            dx *= factor
            dqt += tl.where(right[:, None], dx, 0.0)
            dkt += tl.where(right[:, None], 0.0, dx)
        dqt = tl.where(is_hot, dqt, 0.0) + load_tile(dq, batch, row, head, i, end, K, BLOCK_K, False).to(tl.float32)
        dkt = tl.where(is_hot, dkt, 0.0) + load_tile(dk, batch, row, head, i, end, K, BLOCK_K, False).to(tl.float32)
        dgt = tl.where(is_hot, dgt, 0.0) + load_tile(dg, batch, row, head, i, end, K, BLOCK_K, False).to(tl.float32)
        store_tile(dq, dqt, batch, row, head, i, end, K, BLOCK_K, False)
        store_tile(dk, dkt, batch, row, head, i, end, K, BLOCK_K, False)
        store_tile(dg, dgt, batch, row, head, i, end, K, BLOCK_K, False)
