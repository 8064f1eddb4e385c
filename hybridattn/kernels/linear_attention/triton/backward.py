"""Backward of chunked linear attention: the states of all chunks once more, then one sweep backwards over the keys.

    states        h, the state before every chunk, in the operands' dtype; and which channels are hot
    sweep_keys    gradients of q, k, g and the initial state, a program for 64 keys
    sweep_values  the gradient of v, a program for some values: ``forward`` says how

Notation as in ``forward``; do is the gradient of o, dS that of the state after the chunk, dA = tril(do v^T). With
qb = scale q 2^b and kn = k 2^(shift - b), shift being the bits of a hot channel and 0 for others:

    aq = do h^T + dA kn                     dq = scale 2^b aq
    ik = v dS^T (times D unless hot)        dk = 2^(shift - b) (ik + dA^T qb)
    dS <- D dS + qb^T do

    dg_u = D rowsum(h dS) + sum_{s<u} kn_s ik_s + sum_{t>=u} [ qb_t aq_t - kn_t (dA^T qb)_t ]

Every factor 2^.. that holds g_u adds its product with its gradient, so that each chunk closes for itself and no running
sum over a sequence collects errors. The diagonal of dA has no gate and stays out of dg, where it would have to cancel.
The gradients' own accumulators are used, before they are rounded.
"""

# pyright: reportGeneralTypeIssues=false
# It takes jit functions for ones that never return.

import triton
import triton.language as tl

from .primitives import (
    COOL,
    LOG2E,
    bounded,
    find_sequence,
    load_gates,
    load_tile,
    operand,
    product,
    store_tile,
    sums_of_parts,
    sums_of_rows,
)


@triton.jit
def states(
    k,  # [B,T,*,K], like v a descriptor or a tuple: see ``primitives``
    v,  # [B,T,*,V]
    g,  # [B,T,*,K], or [B,T,*,1] as a tuple, or None
    h,  # [slots,V,HEADS,K]
    first,  # initial state, fp32 [N,*,K,V], or None for zeros
    hot,  # int32 [slots,HEADS,K]: sequence + 1 of hot channels, 0 of others
    cu_seqlens,  # [N+1] or None
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    K_SHARE: tl.constexpr,
    V_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_v: tl.constexpr = (V + 63) // 64
    key = tl.program_id(0) % blocks_k * BLOCK_K
    value = tl.program_id(0) // blocks_k % blocks_v * 64
    n, head = tl.program_id(0) // blocks_k // blocks_v // HEADS, tl.program_id(0) // blocks_k // blocks_v % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T)
    t = tl.arange(0, 64)
    later = t[:, None] < t[None, :]
    channel = key + tl.arange(0, BLOCK_K)

    S = tl.zeros([64, BLOCK_K], tl.float32)
    if first is not None:
        state = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V
        inside = (channel < K)[None, :] & (value + t < V)[:, None]
        S = tl.load(first + state + channel[None, :] * V + value + t[:, None], mask=inside, other=0.0)
    for c in tl.range(0, tl.cdiv(end - start, 64), num_stages=STAGES):
        row = start + c * 64
        store_tile(h, S, slot + c, value, head, key, V, K, BLOCK_K, TMA)
        kt = load_tile(k, batch, row, head // K_SHARE, key, end, K, BLOCK_K, TMA)
        vt = load_tile(v, batch, row, head // V_SHARE, value, end, V, 64, TMA)
        if GATE == "channel":
            gt = bounded(load_tile(g, batch, row, head // G_SHARE, key, end, K, BLOCK_K, TMA))
            e = sums_of_rows(later, gt, TERMS)
            bits = tl.sum(tl.where(t[:, None] == 0, e + gt.to(tl.float32) * LOG2E, 0.0), 0)
            if value == 0:
                flags = hot + ((slot + c) * HEADS + head) * K + channel
                tl.store(flags, tl.where(bits < COOL, n + 1, 0), mask=channel < K)
            kt = operand(kt * tl.exp2(e), PRECISION)
            S *= tl.exp2(bits)[None, :]
        elif GATE == "head":
            gates = load_gates(g, batch, row, head // G_SHARE, end)
            leaving = tl.max(sums_of_rows(later, gates[:, None] + tl.zeros([64, 16], gates.dtype), TERMS), 1)
            kt = operand(kt * tl.exp2(leaving)[:, None], PRECISION)
            S *= tl.exp2(tl.sum(gates.to(tl.float32)) * LOG2E)
        S = product(tl.trans(vt), kt, S, PRECISION)


@triton.jit(do_not_specialize=["scale"])
def sweep_keys(
    q,  # [B,T,*,K], like what follows a descriptor or a tuple
    k,  # [B,T,*,K]
    v,  # [B,T,*,V]
    g,  # as for ``states``
    do,  # [B,T,HEADS,V]
    h,  # [slots,V,HEADS,K]
    dq,  # [B,T,HEADS,K]
    dk,  # [B,T,HEADS,K]
    dg,  # [B,T,HEADS,K], or the parts of every block of keys, a tuple of [B,T,HEADS,blocks], or None
    dlast,  # gradient of the final state, fp32 [N,*,K,V]: given to one of the heads that share it
    dfirst,  # that of the initial state, fp32 [N,HEADS,K,V]
    hot,  # as from ``states``
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
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_v: tl.constexpr = (V + 63) // 64
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    key = tl.program_id(0) % blocks_k * BLOCK_K
    n, head = tl.program_id(0) // blocks_k // HEADS, tl.program_id(0) // blocks_k % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T)
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)
    upto, later = t[:, None] >= t[None, :], t[:, None] < t[None, :]
    earlier = t[:, None] > t[None, :]
    channel = key + tl.arange(0, BLOCK_K)

    places = channel[None, :] * V + t[:, None]
    given = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V
    dS = ()
    for j in tl.static_range(blocks_v):
        inside = (channel < K)[None, :] & (j * 64 + t < V)[:, None] & (head % STATE_SHARE == 0)
        dS = dS + (tl.load(dlast + given + places + j * 64, mask=inside, other=0.0),)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step
        row = start + c * 64
        kt = load_tile(k, batch, row, head // K_SHARE, key, end, K, BLOCK_K, TMA)
        qt = load_tile(q, batch, row, head // Q_SHARE, key, end, K, BLOCK_K, TMA).to(tl.float32) * scale
        if GATE == "channel":
            gt = bounded(load_tile(g, batch, row, head // G_SHARE, key, end, K, BLOCK_K, TMA))
            e = sums_of_rows(upto, gt, TERMS)
            bits = tl.sum(tl.where(t[:, None] == 63, e, 0.0), 0)
            flags = hot + ((slot + c) * HEADS + head) * K + channel
            is_hot = tl.load(flags, mask=channel < K, other=0) > 0
            if exact:
                shift = tl.where(is_hot[None, :], sums_of_rows(later, gt, TERMS), -e)
            else:
                shift = tl.where(is_hot, bits, 0.0)[None, :] - e
            entry, leave, decay = tl.exp2(e), tl.exp2(shift), tl.exp2(bits)
            qt *= entry
            kt = kt * leave
        qb, kn = operand(qt, PRECISION), operand(kt, PRECISION)
        if GATE == "head":
            gates = load_gates(g, batch, row, head // G_SHARE, end)
            repeated = gates[:, None] + tl.zeros([64, 16], gates.dtype)
            entering = tl.max(sums_of_rows(upto, repeated, TERMS), 1)
            leaving = tl.max(sums_of_rows(later, repeated, TERMS), 1)
            if exact:
                past = tl.where(upto, tl.zeros([64, 64], gates.dtype), gates[None, :])
                gaps = sums_of_rows(later, tl.trans(past), TERMS)
                gaps_to = sums_of_rows(upto, tl.where(tl.trans(upto), tl.zeros([64, 64], gates.dtype), gates[:, None]), TERMS)
            else:
                gaps = tl.minimum(entering[None, :] - entering[:, None], 0.0)
                gaps_to = tl.minimum(entering[:, None] - entering[None, :], 0.0)
            decay = tl.exp2(tl.sum(gates.to(tl.float32)) * LOG2E)

        dA, dA_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
        aq, ik = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([64, BLOCK_K], tl.float32)
        own = tl.zeros([BLOCK_K], tl.float32)
        stepped = ()
        for j in tl.static_range(blocks_v):
            dot_ = load_tile(do, batch, row, head, j * 64, end, V, 64, TMA)
            vt = load_tile(v, batch, row, head // V_SHARE, j * 64, end, V, 64, TMA)
            ht = load_tile(h, slot + c, j * 64, head, key, V, K, BLOCK_K, TMA)
            dA = product(dot_, tl.trans(vt), dA, PRECISION)
            dA_turned = product(vt, tl.trans(dot_), dA_turned, PRECISION)
            aq = product(dot_, ht, aq, PRECISION)
            ik = product(vt, operand(dS[j], PRECISION), ik, PRECISION)
            own += tl.sum(ht * dS[j], 0)
            if GATE == "channel":
                s = product(tl.trans(dot_), qb, dS[j] * decay[None, :], PRECISION)
            elif GATE == "head":
                s = product(tl.trans(dot_), operand(qt * tl.exp2(entering)[:, None], PRECISION), dS[j] * decay, PRECISION)
            else:
                s = product(tl.trans(dot_), qb, dS[j], PRECISION)
            stepped = stepped + (s,)
        diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dA, 0.0), 1)[:, None]
        if GATE == "channel":
            ik *= tl.where(is_hot, 1.0, decay)[None, :]
        if GATE == "head":
            aq *= tl.exp2(entering)[:, None]
            ik *= tl.exp2(leaving)[:, None]
            dA *= tl.exp2(gaps_to)
            dA_turned *= tl.exp2(gaps)
        aq = product(operand(tl.where(earlier, dA, 0.0), PRECISION), kn, aq, PRECISION)
        ak = tl.zeros([64, BLOCK_K], tl.float32)
        ak = product(operand(tl.where(later, dA_turned, 0.0), PRECISION), qb, ak, PRECISION)
        if GATE == "channel":
            P, R = qb.to(tl.float32) * aq - kn.to(tl.float32) * ak, kn.to(tl.float32) * ik
            dgt = sums_of_parts(upto == 0, R, PRECISION) if False else tl.zeros([64, BLOCK_K], tl.float32)
            dgt = sums_of_parts(earlier, R, dgt, PRECISION)
            dgt = sums_of_parts(t[:, None] <= t[None, :], P, dgt, PRECISION) + (decay * own)[None, :]
            store_tile(dg, dgt, batch, row, head, key, end, K, BLOCK_K, TMA)
        if GATE == "head":
            P = tl.sum(qb.to(tl.float32) * aq - kn.to(tl.float32) * ak, 1)
            R = tl.sum(kn.to(tl.float32) * ik, 1)
            dgt = tl.sum(tl.where(earlier, R[None, :], tl.where(upto, 0.0, 0.0)), 1)
            dgt += tl.sum(tl.where(t[:, None] <= t[None, :], P[None, :], 0.0), 1) + decay * tl.sum(own, 0)
            corner = dg[0] + tl.cast(batch, tl.int64) * dg[1] + tl.cast(row, tl.int64) * dg[2] + head * dg[3]
            tl.store(corner + t * dg[2] + key // BLOCK_K, dgt, mask=row + t < end)
        aq += diagonal * kn.to(tl.float32)
        ak += ik + diagonal * qb.to(tl.float32)
        if GATE == "channel":
            aq *= entry
            ak *= leave
        store_tile(dq, aq * scale, batch, row, head, key, end, K, BLOCK_K, TMA)
        store_tile(dk, ak, batch, row, head, key, end, K, BLOCK_K, TMA)
        dS = stepped
    places += (n * HEADS + head).to(tl.int64) * K * V
    for j in tl.static_range(blocks_v):
        inside = (channel < K)[None, :] & (j * 64 + t < V)[:, None]
        tl.store(dfirst + places + j * 64, dS[j], mask=inside)
