"""Device functions and the backward kernel of BASED's linear attention, which compute Taylor features tile by tile.

The weights are 1 + z + z^2 / 2 with z = scale q.k (Arora et al., "Simple linear attention language models balance the
recall-throughput tradeoff", 2024, section 4.1). Within a chunk the kernels evaluate this polynomial. Through the state
the weights are inner products of packed features (module ``features``). A feature is a product of two columns of x;
products with one-hot matrices select the columns. So features exist in registers only, never in global memory.
B batch, T time, P features of DIM columns.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .primitives import find_sequence, load_tile, operand, product, store_tile


@triton.jit
def load_keys(
    x,
    features,
    batch,
    row,
    head,
    column,
    end,
    P: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load the tile [64,BLOCK] from ``column`` on of x [B,T,*,P], or of the features of x [B,T,*,DIM].

    ``features`` is None for the first, else a tuple of three tables [P]. The first two hold the columns whose product
    a feature is, -1 for a factor of 1. The third holds the weight of the product.
    """
    if features is None:
        tile = load_tile(x, batch, row, head, column, end, P, BLOCK, TMA)
    else:
        i, j, weight = load_rules(features, column, P, BLOCK)
        xt = load_tile(x, batch, row, head, 0, end, DIM, BLOCK_D, TMA)
        tile = pick(xt, i, BLOCK_D, PRECISION) * pick(xt, j, BLOCK_D, PRECISION) * weight[None, :]
    return tile


@triton.jit
def load_rules(features, column, P, BLOCK: tl.constexpr):
    f = column + tl.arange(0, BLOCK)
    i, j = tl.load(features[0] + f, mask=f < P, other=-1), tl.load(features[1] + f, mask=f < P, other=-1)
    return i, j, tl.load(features[2] + f, mask=f < P, other=0.0)


@triton.jit
def pick(x, i, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Select the columns i of x [64,BLOCK_D]; 1 where i is -1."""
    exact: tl.constexpr = PRECISION if x.dtype == tl.float32 else "ieee"
    hot = tl.arange(0, BLOCK_D)[:, None] == i[None, :]
    return tl.where(i[None, :] < 0, 1.0, tl.dot(x, hot.to(x.dtype), input_precision=exact))


@triton.jit
def unpick(dx, i, factor, total, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Add dx * factor [64,BLOCK] to the columns i of ``total`` [64,BLOCK_D]."""
    hot = i[:, None] == tl.arange(0, BLOCK_D)[None, :]
    return product(operand(dx * factor, PRECISION), operand(hot.to(tl.float32), PRECISION), total, PRECISION)


@triton.jit
def polynomial(x, y, scale, PRECISION: tl.constexpr):
    """Compute z = scale x y^T and the weights 1 + z + z^2 / 2, both [64,64]."""
    z = product(x, tl.trans(y), tl.zeros([64, 64], tl.float32), PRECISION) * scale
    return z, 1 + z + z * z * 0.5


@triton.jit(do_not_specialize=["scale"])
def sweep_features(
    q,  # [B,T,*,DIM]; q to dk are descriptors or tuples: see ``primitives``
    k,  # [B,T,*,DIM]
    v,  # [B,T,*,V]
    do,  # [B,T,HEADS,V]
    h,  # states before all chunks [slots,V,HEADS,P]
    dq,  # output [B,T,HEADS * blocks,DIM] in fp32: one part per block of features, as dk
    dk,
    dlast,  # gradient of the final state, fp32 [N,*,P,V]; only one of the heads that share a state takes it
    dfirst,  # output: gradient of the initial state, fp32 [N,HEADS,P,V]
    features,  # as in ``load_keys``
    cu_seqlens,
    scale,
    T,
    segments,  # per sequence
    DIM: tl.constexpr,
    K: tl.constexpr,  # number of features P
    V: tl.constexpr,
    HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradients of q, k and the initial state: ``sweep_keys`` without gates, for Taylor features.

    A program has a block of features. The program of the first block also adds the gradients that reach q and k
    through the polynomial within a chunk.
    """
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_v: tl.constexpr = (V + 63) // 64
    block = tl.program_id(0) % blocks_k
    n, head = tl.program_id(0) // blocks_k // HEADS, tl.program_id(0) // blocks_k % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, segments)
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)
    feature = block * BLOCK_K + tl.arange(0, BLOCK_K)
    i, j, weight = load_rules(features, block * BLOCK_K, K, BLOCK_K)

    places = feature[None, :] * V + t[:, None]
    given = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V
    dS = ()
    for m in tl.static_range(blocks_v):
        inside = (feature < K)[None, :] & (m * 64 + t < V)[:, None] & (head % STATE_SHARE == 0)
        dS = dS + (tl.load(dlast + given + places + m * 64, mask=inside, other=0.0),)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step
        row = start + c * 64
        qt = load_tile(q, batch, row, head // Q_SHARE, 0, end, DIM, BLOCK_D, TMA)
        kt = load_tile(k, batch, row, head // K_SHARE, 0, end, DIM, BLOCK_D, TMA)
        qi, qj = pick(qt, i, BLOCK_D, PRECISION), pick(qt, j, BLOCK_D, PRECISION)
        ki, kj = pick(kt, i, BLOCK_D, PRECISION), pick(kt, j, BLOCK_D, PRECISION)
        phi = operand(qi * qj * weight[None, :], PRECISION)
        aq, ak = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([64, BLOCK_K], tl.float32)
        stepped = ()
        for m in tl.static_range(blocks_v):
            dot = load_tile(do, batch, row, head, m * 64, end, V, 64, TMA)
            vt = load_tile(v, batch, row, head // V_SHARE, m * 64, end, V, 64, TMA)
            ht = load_tile(h, slot + c, m * 64, head, block * BLOCK_K, V, K, BLOCK_K, TMA)
            aq = product(dot, ht, aq, PRECISION)
            ak = product(vt, operand(dS[m], PRECISION), ak, PRECISION)
            stepped = stepped + (product(tl.trans(dot), phi, dS[m], PRECISION),)
        dS = stepped
        aq *= weight[None, :]
        ak *= weight[None, :]
        dqt, dkt = tl.zeros([64, BLOCK_D], tl.float32), tl.zeros([64, BLOCK_D], tl.float32)
        dqt = unpick(aq, i, qj, dqt, BLOCK_D, PRECISION)
        dqt = unpick(aq, j, qi, dqt, BLOCK_D, PRECISION)
        dkt = unpick(ak, i, kj, dkt, BLOCK_D, PRECISION)
        dkt = unpick(ak, j, ki, dkt, BLOCK_D, PRECISION)
        if block == 0:
            dA, dA_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
            for m in tl.static_range(blocks_v):
                dot = load_tile(do, batch, row, head, m * 64, end, V, 64, TMA)
                vt = load_tile(v, batch, row, head // V_SHARE, m * 64, end, V, 64, TMA)
                dA = product(dot, tl.trans(vt), dA, PRECISION)
                dA_turned = product(vt, tl.trans(dot), dA_turned, PRECISION)
            z, _ = polynomial(qt, kt, scale, PRECISION)
            dz = tl.where(t[:, None] >= t[None, :], dA * (1 + z) * scale, 0.0)
            dqt = product(operand(dz, PRECISION), operand(kt, PRECISION), dqt, PRECISION)
            z, _ = polynomial(kt, qt, scale, PRECISION)
            dz = tl.where(t[:, None] <= t[None, :], dA_turned * (1 + z) * scale, 0.0)
            dkt = product(operand(dz, PRECISION), operand(qt, PRECISION), dkt, PRECISION)
        store_tile(dq, dqt, batch, row, head * blocks_k + block, 0, end, DIM, BLOCK_D, TMA)
        store_tile(dk, dkt, batch, row, head * blocks_k + block, 0, end, DIM, BLOCK_D, TMA)
    places += (n * HEADS + head).to(tl.int64) * K * V
    for m in tl.static_range(blocks_v):
        inside = (feature < K)[None, :] & (m * 64 + t < V)[:, None]
        tl.store(dfirst + places + m * 64, dS[m], mask=inside)
