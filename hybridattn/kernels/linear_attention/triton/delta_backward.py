"""The backward kernels of the chunked gated delta rule; ``delta_chunks`` has the formulas and the notation.

Write do for the gradient of o, dS for that of the state after the chunk, and p[t,s] for the scores of the queries:

    du = p^T do + (k 2^(bits - b)) dS      w = du - M^T diag(beta) du      dv = diag(beta) w      dbeta_t = w_t . r_t
    dS <- D dS + (q 2^b)^T do - (k 2^b)^T dv

So -dv is the gradient of the outputs of one more stream of queries, the keys themselves, which see earlier tokens only.
The gradients of q, k and g are those of gated linear attention with both streams and the values u: see ``backward``.

    sweep_delta      with STATES computes h, the state before every chunk, and r
    sweep_gradients  carries dS backwards and computes dv, dbeta and dh, the gradient of the state after every chunk; a
                     program has a block of value columns
    delta_gradients  computes the gradients of q, k and g; a program has one chunk and head
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .delta_chunks import (
    find_slot,
    head_gaps,
    head_sums,
    inverse_norms,
    key_exponents,
    load_sums,
    load_vector,
)
from .hot_channels import halves
from .primitives import (
    find_sequence,
    gate_sums,
    load_tile,
    operand,
    product,
    store_gates,
    store_tile,
    sums_of_rows,
)


@triton.jit(do_not_specialize=["scale"])
def sweep_gradients(
    q,  # [B,T,*,K]; q to ``pairs`` are descriptors or tuples: see ``primitives``
    k,  # [B,T,*,K]
    g,  # gates [B,T,*,K], or [B,T,*,1] as a tuple, or None
    do,  # [B,T,HEADS,V]
    r,  # [B,T,HEADS,V], from ``sweep_delta``
    dv,  # output [B,T,HEADS,V]
    dbeta,  # output: one part per block of values, fp32 [B,T,HEADS,blocks], a tuple
    solved,  # [B,T,*,64], from ``solve_chunks``
    beta,  # [B,T,*], a tuple
    norms,  # inverse norms of the keys [B,T,*], a tuple, if queries and keys are normalised; else None
    pairs,  # scores of hot channels [B,T,HEADS,64], a tuple, or None
    dh,  # output: gradients of the states after all chunks [slots,V,HEADS,PADDED]
    dlast,  # gradient of the final state, fp32 [N,*,K,V]; only one of the heads that share a state takes it
    dfirst,  # output: gradient of the initial state, fp32 [N,HEADS,K,V]
    hot,  # flags [slots,*,K], from ``solve_chunks``, or None
    cu_seqlens,  # [N+1] or None
    scale,
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    column = tl.program_id(0) % blocks_v * BLOCK_V
    n, head = tl.program_id(0) // blocks_v // HEADS, tl.program_id(0) // blocks_v % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, 1)
    own = head // STATE_SHARE
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)

    keys, columns = tl.arange(0, BLOCK_K)[None, :], column + tl.arange(0, BLOCK_V)[:, None]
    given = (n * (HEADS // STATE_SHARE) + own).to(tl.int64) * K * V + keys * V + columns
    dS = ()
    for i in tl.static_range(blocks_k):
        inside = (i * BLOCK_K + keys < K) & (columns < V) & (head % STATE_SHARE == 0)
        dS = dS + (tl.load(dlast + given + i * BLOCK_K * V, mask=inside, other=0.0),)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step
        row = start + c * 64
        flags = hot
        if GATE == "channel":
            flags = hot + ((slot + c).to(tl.int64) * (HEADS // STATE_SHARE) + own) * K
        elif GATE == "head":
            entering, leaving, bits = head_sums(g, batch, row, head // G_SHARE, end, TERMS)
        place = dh + ((slot + c).to(tl.int64) * V + columns) * HEADS * PADDED + head * PADDED + keys

        # The gradients of u through the state after the chunk; the scores; what dS is multiplied with.
        du = tl.zeros([BLOCK_V, 64], tl.float32)
        scores, squares = tl.zeros([64, 64], tl.float32), tl.zeros([64], tl.float32)  # scores [query, key]
        hottest = 0
        queries, key_queries, stepped = (), (), ()
        for i in tl.static_range(blocks_k):
            inside = (i * BLOCK_K + keys < K) & (columns < V)
            tl.store(place + i * BLOCK_K, dS[i].to(dh.dtype.element_ty), mask=inside)
            kt = load_tile(k, batch, row, head // K_SHARE, i * BLOCK_K, end, K, BLOCK_K, TMA)
            at = load_tile(q, batch, row, head // Q_SHARE, i * BLOCK_K, end, K, BLOCK_K, TMA)
            if norms is not None:
                squares += tl.sum(at.to(tl.float32) * at.to(tl.float32), 1)
            bt, wt, leaving_s, s = kt, kt, dS[i], dS[i]
            if GATE == "channel":
                gt, sums, bits = load_sums(g, batch, row, head // G_SHARE, i * BLOCK_K, end, K, TERMS, BLOCK_K, TMA)
                channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
                flag = tl.load(flags + channel, mask=channel < K, other=0)
                hottest = tl.maximum(hottest, tl.max(flag, 0))
                is_hot, decay = flag > 0, tl.exp2(bits)
                at, bt = operand(at * tl.exp2(sums), PRECISION), operand(kt * tl.exp2(sums), PRECISION)
                wt = operand(kt * tl.exp2(key_exponents(gt, sums, bits, is_hot, TERMS, exact)), PRECISION)
                leaving_s = s * tl.where(is_hot, 1.0, decay)[None, :]
                s *= decay[None, :]
            elif GATE == "head":
                s *= tl.exp2(bits)
            du = product(operand(leaving_s, PRECISION), tl.trans(wt), du, PRECISION)
            scores = product(at, tl.trans(wt), scores, PRECISION)
            queries, key_queries, stepped = queries + (at,), key_queries + (bt,), stepped + (s,)
        if GATE == "head":
            du *= tl.exp2(leaving)[None, :]
            scores *= tl.exp2(head_gaps(g, entering, batch, row, head // G_SHARE, end, TERMS, exact))
        if GATE == "channel":
            if hottest > 0:
                scores += load_tile(pairs, batch, row, head, 0, end, 64, 64, False).to(tl.float32)
        scores = operand(tl.where(t[:, None] >= t[None, :], scores, 0.0), PRECISION)

        dot = tl.trans(load_tile(do, batch, row, head, column, end, V, BLOCK_V, TMA)).to(tl.float32) * scale
        if norms is not None:
            dot *= inverse_norms(squares)[None, :]
        du = product(operand(dot, PRECISION), scores, du, PRECISION)
        strength = load_vector(beta, batch, row, own, end)
        if norms is not None:
            scales = load_vector(norms, batch, row, own, end)
            du *= scales[None, :]
        M = load_tile(solved, batch, row, own, 0, end, 64, 64, TMA)
        w = du - product(operand(du * strength[None, :], SOLVE), M, tl.zeros([BLOCK_V, 64], tl.float32), SOLVE)
        rt = tl.trans(load_tile(r, batch, row, head, column, end, V, BLOCK_V, TMA)).to(tl.float32)
        store_gates(dbeta, tl.sum(w * rt, 0), batch, row, head, column // BLOCK_V, end)
        w *= strength[None, :]
        store_tile(dv, tl.trans(w), batch, row, head, column, end, V, BLOCK_V, TMA)

        if norms is not None:
            w *= scales[None, :]
        if GATE == "head":
            dot, w = dot * tl.exp2(entering)[None, :], w * tl.exp2(entering)[None, :]
        dot, w = operand(dot, PRECISION), operand(-w, PRECISION)
        dS = ()
        for i in tl.static_range(blocks_k):
            s = product(dot, queries[i], stepped[i], PRECISION)
            dS = dS + (product(w, key_queries[i], s, PRECISION),)
    places = (n * HEADS + head).to(tl.int64) * K * V + keys * V + columns
    for i in tl.static_range(blocks_k):
        inside = (i * BLOCK_K + keys < K) & (columns < V)
        tl.store(dfirst + places + i * BLOCK_K * V, dS[i], mask=inside)


@triton.jit
def through_norm(dx, x, NORMALIZE: tl.constexpr):
    """Return the gradient of x from dx, the gradient of x / sqrt(sum of squares + 1e-6); dx itself otherwise."""
    if NORMALIZE:
        scale = inverse_norms(tl.sum(x * x, 1))[:, None]
        unit = x * scale
        dx = scale * (dx - unit * tl.sum(unit * dx, 1)[:, None])
    return dx


@triton.jit
def hot_gradients(x, right, reach, siblings, gt, dA, dg, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the gradients of the rows x through the scores of one level of ``halves``, and dg plus theirs.

    dA [64,64] is symmetric: the gradient of the score of two rows at both of their places.
    """
    parts: tl.constexpr = 3 if PRECISION == "tf32x3" or PRECISION == "ieee" else 2
    factor = tl.exp2(gate_sums(reach, gt, TERMS))
    x *= factor
    pairs = operand(tl.where(siblings, dA, 0.0), PRECISION)
    dx = product(pairs, operand(x, PRECISION), tl.zeros(x.shape, tl.float32), PRECISION)
    return dx * factor, sums_of_rows(tl.trans(reach), x * dx, dg, parts)


@triton.jit(do_not_specialize=["scale"])
def delta_gradients(
    q,  # [B,T,*,K]; q to dg are tuples: see ``primitives``
    k,  # [B,T,*,K]
    g,  # as in ``sweep_gradients``
    do,  # [B,T,HEADS,V]
    r,  # [B,T,HEADS,V], from ``sweep_delta``
    dv,  # [B,T,HEADS,V], from ``sweep_gradients``
    beta,  # [B,T,*]
    h,  # states before all chunks [slots,V,HEADS,padded K], from ``sweep_delta``
    dh,  # gradients of the states after all chunks, from ``sweep_gradients``
    dq,  # output [B,T,HEADS,K]
    dk,  # output [B,T,HEADS,K]
    dg,  # output [B,T,HEADS,K] or [B,T,HEADS,1], or None
    hot,
    cu_seqlens,
    scale,
    T,
    sequences,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all keys
):
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    parts: tl.constexpr = 3 if exact else 2
    slot, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    batch, row, end = find_slot(cu_seqlens, slot, T, sequences)
    if row >= end:
        return
    t = tl.arange(0, 64)
    earlier, upto = t[:, None] > t[None, :], t[:, None] >= t[None, :]  # columns before, up to
    later, since = t[:, None] < t[None, :], t[:, None] <= t[None, :]
    channel = tl.arange(0, BLOCK_K)

    # Gradients of the scores of queries (dA) and of keys as queries (dB), also transposed; products with the states.
    dA, dA_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    dB, dB_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    aq, ap = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([64, BLOCK_K], tl.float32)
    ik, kept = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    strength = load_vector(beta, batch, row, head // STATE_SHARE, end)
    for j in range(0, V, 64):
        dot = load_tile(do, batch, row, head, j, end, V, 64, False)
        dvt = load_tile(dv, batch, row, head, j, end, V, 64, False)
        ut = operand(load_tile(r, batch, row, head, j, end, V, 64, False) * strength[:, None], PRECISION)
        ht = load_tile(h, slot, j, head, 0, V, K, BLOCK_K, False)
        dht = load_tile(dh, slot, j, head, 0, V, K, BLOCK_K, False)
        dA, dA_turned = product(dot, tl.trans(ut), dA, PRECISION), product(ut, tl.trans(dot), dA_turned, PRECISION)
        dB, dB_turned = product(dvt, tl.trans(ut), dB, PRECISION), product(ut, tl.trans(dvt), dB_turned, PRECISION)
        aq, ap = product(dot, ht, aq, PRECISION), product(dvt, ht, ap, PRECISION)
        ik = product(ut, dht, ik, PRECISION)
        kept += tl.sum(ht.to(tl.float32) * dht.to(tl.float32), 0)
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dA, 0.0), 1)[:, None]
    dA, dA_turned = tl.where(earlier, dA, 0.0), tl.where(later, dA_turned, 0.0)
    dB, dB_turned = tl.where(earlier, -dB, 0.0), tl.where(later, -dB_turned, 0.0)

    qt = load_tile(q, batch, row, head // Q_SHARE, 0, end, K, BLOCK_K, False).to(tl.float32)
    kt = load_tile(k, batch, row, head // K_SHARE, 0, end, K, BLOCK_K, False).to(tl.float32)
    at, bt = qt * scale, kt
    if NORMALIZE:
        at *= inverse_norms(tl.sum(qt * qt, 1))[:, None]
        bt *= inverse_norms(tl.sum(kt * kt, 1))[:, None]
    units, unit_keys = at, bt  # without decay
    wt, past_q, past_p = bt, aq, -ap
    if GATE == "channel":
        gt, sums, bits = load_sums(g, batch, row, head // G_SHARE, 0, end, K, TERMS, BLOCK_K, False)
        flags = hot + (slot.to(tl.int64) * (HEADS // STATE_SHARE) + head // STATE_SHARE) * K
        flag = tl.load(flags + channel, mask=channel < K, other=0)
        is_hot, decay = flag > 0, tl.exp2(bits)
        exponents = key_exponents(gt, sums, bits, is_hot, TERMS, exact)
        at, wt, bt = at * tl.exp2(sums), bt * tl.exp2(exponents), bt * tl.exp2(sums)
        ik *= tl.where(is_hot, 1.0, decay)[None, :]
    elif GATE == "head":
        entering, leaving, bits = head_sums(g, batch, row, head // G_SHARE, end, TERMS)
        decay = tl.exp2(bits)
        gaps = tl.exp2(head_gaps(g, entering, batch, row, head // G_SHARE, end, TERMS, exact))
        dA, dB = dA * gaps, dB * gaps
        dA_turned, dB_turned = dA_turned * tl.trans(gaps), dB_turned * tl.trans(gaps)
        past_q *= tl.exp2(entering)[:, None]
        past_p *= tl.exp2(entering)[:, None]
        ik *= tl.exp2(leaving)[:, None]
    qb, pb, kn = operand(at, PRECISION), operand(bt, PRECISION), operand(wt, PRECISION)
    aq = product(operand(dA, PRECISION), kn, past_q, PRECISION)
    ap = product(operand(dB, PRECISION), kn, past_p, PRECISION)
    ak = product(operand(dA_turned, PRECISION), qb, tl.zeros([64, BLOCK_K], tl.float32), PRECISION)
    ak = product(operand(dB_turned, PRECISION), pb, ak, PRECISION)

    # The gates of a chunk: see ``backward``. No gate acts on the diagonal, so it comes after them.
    # The rounded operands of the products above: their errors cancel in the sums.
    at, bt, wt = qb.to(tl.float32), pb.to(tl.float32), kn.to(tl.float32)
    pairs, past_keys = at * aq + bt * ap - wt * ak, wt * ik
    aq += diagonal * wt
    ak += ik + diagonal * at
    if GATE == "channel":
        dgt = (decay * kept)[None, :] + tl.zeros([64, BLOCK_K], tl.float32)
        dgt = sums_of_rows(earlier, past_keys, dgt, parts)
        dgt = sums_of_rows(since, pairs, dgt, parts)
        aq, ak = aq * tl.exp2(sums), ak * tl.exp2(exponents) + ap * tl.exp2(sums)
        if tl.max(flag, 0) > 0:
            # Rows have the same layout as columns: the matrix of gradients is made symmetric.
            both_A, both_B = dA + dA_turned, dB + dB_turned
            hq, hk = diagonal * unit_keys, diagonal * units
            hg = tl.zeros([64, BLOCK_K], tl.float32)
            for level in range(6):
                right, reach, siblings = halves(level)
                x = tl.where(right[:, None], units, unit_keys)
                dx, hg = hot_gradients(x, right, reach, siblings, gt, both_A, hg, TERMS, PRECISION)
                hq += tl.where(right[:, None], dx, 0.0)
                hk += tl.where(right[:, None], 0.0, dx)
                dx, hg = hot_gradients(unit_keys, right, reach, siblings, gt, both_B, hg, TERMS, PRECISION)
                hk += dx
            aq += tl.where(is_hot[None, :], hq, 0.0)
            ak += tl.where(is_hot[None, :], hk, 0.0)
            dgt += tl.where(is_hot[None, :], hg, 0.0)
        store_tile(dg, dgt, batch, row, head, 0, end, K, BLOCK_K, False)
    else:
        ak += ap
        if GATE == "head":
            pair, past_key = tl.sum(pairs, 1), tl.sum(past_keys, 1)
            dgt = tl.sum(tl.where(later, past_key[:, None], 0.0) + tl.where(upto, pair[:, None], 0.0), 0)
            store_gates(dg, dgt + decay * tl.sum(kept), batch, row, head, 0, end)
    store_tile(dq, through_norm(aq * scale, qt, NORMALIZE), batch, row, head, 0, end, K, BLOCK_K, False)
    store_tile(dk, through_norm(ak, kt, NORMALIZE), batch, row, head, 0, end, K, BLOCK_K, False)
