"""Backward pass of chunked linear attention: the kernel for the gradients of q, k, g and the initial state.

The backward pass launches three kernels:

    states        (``chunk_states``) recomputes h, the state before every chunk, in the operands' dtype, and finds the
                  hot channels
    sweep_keys    computes the gradients of q, k, g and the initial state in one reverse sweep; a program has a block
                  of key columns
    sweep_values  (``forward``) computes the gradient of v; a program has a block of value columns

Notation as in ``forward``; do is the gradient of o, dS the gradient of the state after the chunk, dA = tril(do v^T).
With qb = scale q 2^b and kn = k 2^(shift - b), where shift is ``bits`` for a hot channel and 0 for others:

    aq = do h^T + dA kn                     dq = scale 2^b aq
    ik = v dS^T (times D unless hot)        dk = 2^(shift - b) (ik + dA^T qb)
    dS <- D dS + qb^T do

    dg_u = D rowsum(h dS) + sum_{s<u} kn_s ik_s + sum_{t>=u} [ qb_t aq_t - kn_t (dA^T qb)_t ]

dg_u sums, over all factors 2^.. that contain g_u, the factor times the factor's gradient. Its sums stay within a chunk,
so numerical errors do not accumulate over a sequence. The diagonal of dA is left out of dg: no gate acts on it, and its
two terms would only cancel. dg is computed from the fp32 accumulators of dq and dk, before these are rounded.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    bounded,
    find_sequence,
    gate_sums,
    load_gates,
    load_tile,
    operand,
    product,
    store_gates,
    store_tile,
    sums_of_rows,
)


@triton.jit(do_not_specialize=["scale"])
def sweep_keys(
    q,  # [B,T,*,K]; q to dg are descriptors or tuples: see ``primitives``
    k,  # [B,T,*,K]
    v,  # [B,T,*,V]
    g,  # as in ``chunk_states``
    do,  # [B,T,HEADS,V]
    h,  # [slots,V,HEADS,K], from ``chunk_states``
    dq,  # output [B,T,HEADS,K]
    dk,  # output [B,T,HEADS,K]
    dg,  # output [B,T,HEADS,K]; for gates per head one part per block of keys, [B,T,HEADS,blocks]; or None
    dlast,  # gradient of the final state, fp32 [N,*,K,V]; only one of the heads that share a state takes it
    dfirst,  # output: gradient of the initial state, fp32 [N,HEADS,K,V]
    hot,  # from ``chunk_states``
    cu_seqlens,
    scale,
    T,
    segments,  # per sequence
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
    parts: tl.constexpr = 3 if exact else 2
    key = tl.program_id(0) % blocks_k * BLOCK_K
    n, head = tl.program_id(0) // blocks_k // HEADS, tl.program_id(0) // blocks_k % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, segments)
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)
    earlier, upto = t[:, None] > t[None, :], t[:, None] >= t[None, :]  # columns before, up to
    later, since = t[:, None] < t[None, :], t[:, None] <= t[None, :]
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
        dA, dA_turned = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
        for j in tl.static_range(blocks_v):
            dot = load_tile(do, batch, row, head, j * 64, end, V, 64, TMA)
            vt = load_tile(v, batch, row, head // V_SHARE, j * 64, end, V, 64, TMA)
            dA = product(dot, tl.trans(vt), dA, PRECISION)
            dA_turned = product(vt, tl.trans(dot), dA_turned, PRECISION)
        diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dA, 0.0), 1)[:, None]
        kt = load_tile(k, batch, row, head // K_SHARE, key, end, K, BLOCK_K, TMA)
        qt = load_tile(q, batch, row, head // Q_SHARE, key, end, K, BLOCK_K, TMA).to(tl.float32) * scale
        if GATE == "channel":
            gt = bounded(load_tile(g, batch, row, head // G_SHARE, key, end, K, BLOCK_K, TMA))
            e = gate_sums(upto, gt, TERMS)
            bits = tl.min(e, 0)
            is_hot = (
                tl.load(hot + ((slot + c).to(tl.int64) * HEADS + head) * K + channel, mask=channel < K, other=0) > 0
            )
            if exact:
                shift = tl.where(is_hot[None, :], gate_sums(later, gt, TERMS), -e)
            else:
                shift = tl.where(is_hot, bits, 0.0)[None, :] - e
            decay = tl.exp2(bits)
            qt *= tl.exp2(e)
            kt = kt * tl.exp2(shift)
        qb, kn = operand(qt, PRECISION), operand(kt, PRECISION)
        if GATE == "head":
            gates = load_gates(g, batch, row, head // G_SHARE, end)
            repeated = gates[:, None] + tl.zeros([64, 16], gates.dtype)
            entering = tl.max(gate_sums(upto, repeated, TERMS), 1)
            leaving = tl.max(gate_sums(later, repeated, TERMS), 1)
            decay = tl.exp2(tl.sum(gates.to(tl.float32)) * LOG2E)
            qs = operand(qt * tl.exp2(entering)[:, None], PRECISION)
            if exact:
                past = tl.where(earlier, gates[:, None], tl.zeros([64, 64], gates.dtype))
                gaps = gate_sums(upto, past, TERMS)
            else:
                gaps = tl.minimum(entering[:, None] - entering[None, :], 0.0)
            dA *= tl.exp2(gaps)
            dA_turned *= tl.exp2(tl.trans(gaps))
        else:
            qs = qb
        aq, ak = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([64, BLOCK_K], tl.float32)
        aq = product(operand(tl.where(earlier, dA, 0.0), PRECISION), kn, aq, PRECISION)
        ak = product(operand(tl.where(later, dA_turned, 0.0), PRECISION), qb, ak, PRECISION)

        past_q, ik = tl.zeros([64, BLOCK_K], tl.float32), tl.zeros([64, BLOCK_K], tl.float32)
        own = tl.zeros([BLOCK_K], tl.float32)
        stepped = ()
        for j in tl.static_range(blocks_v):
            dot = load_tile(do, batch, row, head, j * 64, end, V, 64, TMA)
            vt = load_tile(v, batch, row, head // V_SHARE, j * 64, end, V, 64, TMA)
            ht = load_tile(h, slot + c, j * 64, head, key, V, K, BLOCK_K, TMA)
            if GATE == "head":
                past_q = product(dot, ht, past_q, PRECISION)
            else:
                aq = product(dot, ht, aq, PRECISION)
            ik = product(vt, operand(dS[j], PRECISION), ik, PRECISION)
            own += tl.sum(ht * dS[j], 0)
            s = dS[j]
            if GATE == "channel":
                s *= decay[None, :]
            elif GATE == "head":
                s *= decay
            stepped = stepped + (product(tl.trans(dot), qs, s, PRECISION),)
        dS = stepped
        if GATE == "channel":
            ik *= tl.where(is_hot, 1.0, decay)[None, :]
        elif GATE == "head":
            aq += past_q * tl.exp2(entering)[:, None]
            ik *= tl.exp2(leaving)[:, None]
        pairs = qb.to(tl.float32) * aq - kn.to(tl.float32) * ak
        past_keys = kn.to(tl.float32) * ik
        aq += diagonal * kn.to(tl.float32)
        ak += ik + diagonal * qb.to(tl.float32)
        if GATE == "channel":
            dgt = (decay * own)[None, :] + tl.zeros([64, BLOCK_K], tl.float32)
            dgt = sums_of_rows(earlier, past_keys, dgt, parts)
            dgt = sums_of_rows(since, pairs, dgt, parts)
            store_tile(dg, dgt, batch, row, head, key, end, K, BLOCK_K, TMA)
        elif GATE == "head":
            pair, past_key = tl.sum(pairs, 1), tl.sum(past_keys, 1)
            dgt = tl.sum(tl.where(later, past_key[:, None], 0.0) + tl.where(upto, pair[:, None], 0.0), 0)
            store_gates(dg, dgt + decay * tl.sum(own), batch, row, head, key // BLOCK_K, end)
        if GATE == "channel":
            aq *= tl.exp2(e)
            ak *= tl.exp2(shift)
        store_tile(dq, aq * scale, batch, row, head, key, end, K, BLOCK_K, TMA)
        store_tile(dk, ak, batch, row, head, key, end, K, BLOCK_K, TMA)
    places += (n * HEADS + head).to(tl.int64) * K * V
    for j in tl.static_range(blocks_v):
        inside = (channel < K)[None, :] & (j * 64 + t < V)[:, None]
        tl.store(dfirst + places + j * 64, dS[j], mask=inside)
