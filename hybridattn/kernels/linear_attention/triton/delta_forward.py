"""The forward sweep of the chunked gated delta rule; ``delta_chunks`` has the formulas.

A program sweeps over the chunks of a sequence with BLOCK_V columns of the state of one head in registers. Every tile
with a value dimension is transposed: the state is S^T [BLOCK_V,K], and values, u and outputs are [BLOCK_V,64]. So the
left operand of each product that depends on the state is a computed tile in registers, and none of them is transposed:
Triton before 3.7.1 compiles transposed ones wrongly for sm_90.
"""

# pyright: reportGeneralTypeIssues=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .delta_chunks import head_gaps, head_sums, inverse_norms, key_exponents, load_sums, load_vector
from .primitives import find_sequence, load_tile, operand, product, store_tile


# ``scale`` is never specialised: ptxas 12.8 miscompiles some kernels for sm_90 if it is the constant 1.
@triton.jit(do_not_specialize=["scale"])
def sweep_delta(
    q,  # [B,T,*,K]; q to ``pairs`` are descriptors or tuples: see ``primitives``
    k,  # [B,T,*,K]
    v,  # [B,T,*,V]
    g,  # gates [B,T,*,K], or [B,T,*,1] as a tuple, or None
    y,  # output: o, or with STATES r, [B,T,HEADS,V]
    solved,  # [B,T,*,64], from ``solve_chunks``
    beta,  # [B,T,*], a tuple
    norms,  # inverse norms of the keys [B,T,*], a tuple, if queries and keys are normalised; else None
    pairs,  # scores of hot channels [B,T,HEADS,64], a tuple, or None
    h,  # output of STATES: states before all chunks [slots,V,HEADS,padded K]; else None
    first,  # initial states, fp32 [N,*,K,V], or None for zeros
    last,  # output: final states, or None
    hot,  # flags [slots,*,K], from ``solve_chunks``, or None
    cu_seqlens,  # [N+1] or None
    scale,
    T,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED: tl.constexpr,  # columns of a row of h
    HEADS: tl.constexpr,  # heads of y; neighbouring heads of y share a head of a tensor with fewer heads
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,  # also of v, beta, solved, norms and hot
    GATE: tl.constexpr,  # "", "head" or "channel"
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,  # precision of products with M
    STATES: tl.constexpr,  # compute what the backward pass needs, instead of outputs
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    LAST: tl.constexpr = PRECISION if PRECISION == "bf16" else SOLVE  # of products with u
    column = tl.program_id(0) % blocks_v * BLOCK_V
    n, head = tl.program_id(0) // blocks_v // HEADS, tl.program_id(0) // blocks_v % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, 1)
    own = head // STATE_SHARE
    t = tl.arange(0, 64)

    keys, columns = tl.arange(0, BLOCK_K)[None, :], column + tl.arange(0, BLOCK_V)[:, None]
    state = (n * (HEADS // STATE_SHARE) + own).to(tl.int64) * K * V + keys * V + columns
    S = ()
    for i in tl.static_range(blocks_k):
        if first is None:
            S = S + (tl.zeros([BLOCK_V, BLOCK_K], tl.float32),)
        else:
            inside = (i * BLOCK_K + keys < K) & (columns < V)
            S = S + (tl.load(first + state + i * BLOCK_K * V, mask=inside, other=0.0),)
    for c in tl.range(0, tl.cdiv(end - start, 64), num_stages=STAGES):
        row = start + c * 64
        flags = hot
        if GATE == "channel":
            flags = hot + ((slot + c).to(tl.int64) * (HEADS // STATE_SHARE) + own) * K
        elif GATE == "head":
            entering, leaving, bits = head_sums(g, batch, row, head // G_SHARE, end, TERMS)
        if h is not None:
            place = h + ((slot + c).to(tl.int64) * V + columns) * HEADS * PADDED + head * PADDED + keys
            for i in tl.static_range(blocks_k):
                inside = (i * BLOCK_K + keys < K) & (columns < V)
                tl.store(place + i * BLOCK_K, S[i].to(h.dtype.element_ty), mask=inside)

        # Everything that reads S: the values that S holds for the keys, and the outputs; and the scores.
        known, yt = tl.zeros([BLOCK_V, 64], tl.float32), tl.zeros([BLOCK_V, 64], tl.float32)
        scores, squares = tl.zeros([64, 64], tl.float32), tl.zeros([64], tl.float32)  # scores [key, query]
        hottest = 0
        leaving_keys, kept, stepped = (), (), ()
        for i in tl.static_range(blocks_k):
            kt = load_tile(k, batch, row, head // K_SHARE, i * BLOCK_K, end, K, BLOCK_K, TMA)
            bt, wt, s = kt, kt, S[i]
            if GATE == "channel":
                gt, sums, bits = load_sums(g, batch, row, head // G_SHARE, i * BLOCK_K, end, K, TERMS, BLOCK_K, TMA)
                channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
                flag = tl.load(flags + channel, mask=channel < K, other=0)
                hottest = tl.maximum(hottest, tl.max(flag, 0))
                is_hot, decay = flag > 0, tl.exp2(bits)
                bt = operand(kt * tl.exp2(sums), PRECISION)
                wt = operand(kt * tl.exp2(key_exponents(gt, sums, bits, is_hot, TERMS, exact)), PRECISION)
                s *= tl.where(is_hot, decay, 1.0)[None, :]
                kept = kept + (tl.where(is_hot, 1.0, decay),)
            elif GATE == "head":
                s *= tl.exp2(bits)
            known = product(operand(S[i], PRECISION), tl.trans(bt), known, PRECISION)
            if not STATES:
                at = load_tile(q, batch, row, head // Q_SHARE, i * BLOCK_K, end, K, BLOCK_K, TMA)
                if norms is not None:
                    squares += tl.sum(at.to(tl.float32) * at.to(tl.float32), 1)
                if GATE == "channel":
                    at = operand(at * tl.exp2(sums), PRECISION)
                scores = product(wt, tl.trans(at), scores, PRECISION)
                yt = product(operand(S[i], PRECISION), tl.trans(at), yt, PRECISION)
            leaving_keys, stepped = leaving_keys + (wt,), stepped + (s,)
        if GATE == "head":
            known *= tl.exp2(entering)[None, :]
        if not STATES:
            if GATE == "head":
                yt *= tl.exp2(entering)[None, :]
                scores *= tl.exp2(tl.trans(head_gaps(g, entering, batch, row, head // G_SHARE, end, TERMS, exact)))
            if GATE == "channel":
                if hottest > 0:
                    scores += tl.trans(load_tile(pairs, batch, row, head, 0, end, 64, 64, False).to(tl.float32))
            scores = operand(tl.where(t[:, None] <= t[None, :], scores, 0.0), LAST)

        # r = x - M diag(beta) x with x = v - (k 2^b) S
        vt = load_tile(v, batch, row, own, column, end, V, BLOCK_V, TMA)
        strength = load_vector(beta, batch, row, own, end)
        if norms is not None:
            scales = load_vector(norms, batch, row, own, end)
            known *= scales[None, :]
        x = tl.trans(vt).to(tl.float32) - known
        M = load_tile(solved, batch, row, own, 0, end, 64, 64, TMA)
        r = x - product(operand(x * strength[None, :], SOLVE), tl.trans(M), tl.zeros([BLOCK_V, 64], tl.float32), SOLVE)
        if STATES:
            store_tile(y, tl.trans(r), batch, row, head, column, end, V, BLOCK_V, TMA)
        u = r * strength[None, :]
        if norms is not None:
            u *= scales[None, :]

        # Gated linear attention with the values u.
        if not STATES:
            yt = product(operand(u, LAST), scores, yt, LAST) * scale
            if norms is not None:
                yt *= inverse_norms(squares)[None, :]
            store_tile(y, tl.trans(yt), batch, row, head, column, end, V, BLOCK_V, TMA)
        if GATE == "head":
            u *= tl.exp2(leaving)[None, :]
        u = operand(u, LAST)
        S = ()
        for i in tl.static_range(blocks_k):
            s = product(u, leaving_keys[i], stepped[i], LAST)
            if GATE == "channel":
                s *= kept[i][None, :]
            S = S + (s,)
    if last is not None:
        for i in tl.static_range(blocks_k):
            inside = (i * BLOCK_K + keys < K) & (columns < V) & (head % STATE_SHARE == 0)
            tl.store(last + state + i * BLOCK_K * V, S[i], mask=inside)
