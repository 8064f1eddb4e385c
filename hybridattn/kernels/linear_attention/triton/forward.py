"""The forward kernel of chunked linear attention: a program sweeps over the chunks with the state in registers.

B batch, T time, N sequences, K key dim, V value dim. Per chunk of 64 tokens, with b the running sum of the gates:

    o_t = scale * (q_t 2^b_t) S + scale * sum_{s<=t} [ (q_t 2^b_t) . (k_s 2^-b_s) ] v_s
    S  <- D S + (k 2^(bits - b))^T v,   bits = b of the last token, D = 2^bits

(Yang et al., "Gated Linear Attention Transformers", section 4; gates in base 2.) The gradient of v is the same sweep in
reverse order. Keys take the place of queries, and the gradient of o that of v. Hence the neutral names: output y_t
reads the state with row a_t, and the state accumulates w_s^T u_s.

A channel is *hot* in a chunk if its gates sum to less than -86 bits there, so that 2^-b could overflow. The kernel
then uses the keys k 2^(bits - b) for both state and scores. The state stays exact. The channel's contribution to the
chunk's own scores shrinks by 2^bits, to nothing; the kernels of ``hot_channels`` add it. So this kernel has no branch
for hot channels, and takes gates down to -inf.

A gate per head multiplies the scores instead; its factors cannot overflow.

Tokens are the rows of every tile except the state, which is S^T [BLOCK_V,BLOCK_K]. So no computed tile is transposed to
be the left operand of a product: Triton before 3.7.1 compiles that wrongly for sm_90.
"""

# pyright: reportGeneralTypeIssues=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .primitives import (
    COOL,
    LOG2E,
    bounded,
    find_sequence,
    gate_sums,
    load_gates,
    load_tile,
    operand,
    product,
    store_tile,
)
from .taylor import load_keys, polynomial


# ``scale`` is never specialised: ptxas 12.8 miscompiles some kernels for sm_90 if it is the constant 1.
@triton.jit(do_not_specialize=["scale"])
def sweep_values(
    a,  # q, with REVERSE k [B,T,*,K]; a, w, u, y are descriptors or tuples: see ``primitives``
    w,  # k, with REVERSE q [B,T,*,K]
    u,  # v, with REVERSE the gradient of o [B,T,*,V]
    g,  # gates [B,T,*,K], or [B,T,*,1] as a tuple, or None
    y,  # output: o, with REVERSE the gradient of v [B,T,HEADS,V]
    first,  # state before the first step of the sweep, fp32 [N,*,K,V], or None for zeros
    last,  # output: state after the last step, or None
    hot,  # int32 [slots,HEADS,K], sequence + 1 for hot channels, 0 for others; the forward sweep writes, REVERSE reads
    features,  # feature tables, see ``taylor``: a and w are [B,T,*,DIM], ``scale`` is the factor of z; or None
    cu_seqlens,  # [N+1] or None
    scale,
    T,
    segments,  # per sequence
    DIM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,  # heads of y; neighbouring heads of y share a head of a tensor with fewer heads
    A_SHARE: tl.constexpr,
    W_SHARE: tl.constexpr,
    U_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,  # "", "head" or "channel"
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    column = tl.program_id(0) % blocks_v * BLOCK_V
    n, head = tl.program_id(0) // blocks_v // HEADS, tl.program_id(0) // blocks_v % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, segments)
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)
    seen = (t[:, None] <= t[None, :]) if REVERSE else (t[:, None] >= t[None, :])  # [row of a, row of w]
    reach = (t[:, None] < t[None, :]) if REVERSE else seen  # gates between the chunk's edge and the row

    keys, columns = tl.arange(0, BLOCK_K)[None, :], column + tl.arange(0, BLOCK_V)[:, None]
    state = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V + keys * V + columns
    S = ()
    for i in tl.static_range(blocks_k):
        if first is None:
            S = S + (tl.zeros([BLOCK_V, BLOCK_K], tl.float32),)
        else:
            inside = (i * BLOCK_K + keys < K) & (columns < V)
            if REVERSE:  # the results of heads that share a state are summed, so only one takes its gradient
                inside &= head % STATE_SHARE == 0
            S = S + (tl.load(first + state + i * BLOCK_K * V, mask=inside, other=0.0),)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step if REVERSE else step
        row = start + c * 64
        ut = load_tile(u, batch, row, head // U_SHARE, column, end, V, BLOCK_V, TMA)
        scores = tl.zeros([64, 64], tl.float32)
        yt = tl.zeros([64, BLOCK_V], tl.float32)
        if features is not None:
            at = load_tile(a, batch, row, head // A_SHARE, 0, end, DIM, BLOCK_D, TMA)
            wt = load_tile(w, batch, row, head // W_SHARE, 0, end, DIM, BLOCK_D, TMA)
            _, scores = polynomial(at, wt, scale, PRECISION)
        if GATE == "head":
            gates = load_gates(g, batch, row, head // G_SHARE, end)
            repeated = gates[:, None] + tl.zeros([64, 16], gates.dtype)
            entering = tl.max(gate_sums(reach, repeated, TERMS), 1)
            leaving = tl.max(gate_sums(reach == 0, repeated, TERMS), 1)
            decay = tl.exp2(tl.sum(gates.to(tl.float32)) * LOG2E)
        stepped = ()
        for i in tl.static_range(blocks_k):
            at = load_keys(
                a, features, batch, row, head // A_SHARE, i * BLOCK_K, end, K, DIM, BLOCK_K, BLOCK_D, PRECISION, TMA
            )
            wt = load_keys(
                w, features, batch, row, head // W_SHARE, i * BLOCK_K, end, K, DIM, BLOCK_K, BLOCK_D, PRECISION, TMA
            )
            if features is not None:
                at, wt = operand(at, PRECISION), operand(wt, PRECISION)
            s = S[i]
            if GATE == "channel":
                gt = bounded(load_tile(g, batch, row, head // G_SHARE, i * BLOCK_K, end, K, BLOCK_K, TMA))
                e = gate_sums(reach, gt, TERMS)
                # No gate is positive, so the sum of all gates is the least running sum.
                bits = tl.min(e + gt.to(tl.float32) * LOG2E if REVERSE else e, 0)
                channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
                flags = hot + ((slot + c).to(tl.int64) * HEADS + head) * K + channel
                if REVERSE:
                    is_hot = tl.load(flags, mask=channel < K, other=0) > 0
                else:
                    is_hot = bits < COOL
                    if column == 0:
                        tl.store(flags, tl.where(is_hot, n // segments + 1, 0), mask=channel < K)
                if exact:
                    shift = tl.where(is_hot[None, :], gate_sums(reach == 0, gt, TERMS), -e)
                else:  # 16-bit operands round more than this difference of running sums
                    shift = tl.where(is_hot, bits, 0.0)[None, :] - e
                at = operand(at * tl.exp2(e), PRECISION)
                if REVERSE:
                    wt = wt.to(tl.float32) * scale
                wt = operand(wt * tl.exp2(shift), PRECISION)
                decay = tl.exp2(bits)
                s *= tl.where(is_hot, decay, 1.0)[None, :]
            if features is None:
                scores = product(at, tl.trans(wt), scores, PRECISION)
            yt = product(at, tl.trans(operand(S[i], PRECISION)), yt, PRECISION)
            if GATE == "head":
                s *= decay
                wt = wt * (tl.exp2(leaving) * scale if REVERSE else tl.exp2(leaving))[:, None]
                wt = operand(wt, PRECISION)
            elif GATE == "" and REVERSE and features is None:
                wt = operand(wt.to(tl.float32) * scale, PRECISION)
            s = product(tl.trans(ut), wt, s, PRECISION)
            if GATE == "channel":
                s *= tl.where(is_hot, 1.0, decay)[None, :]
            stepped = stepped + (s,)
        S = stepped
        if GATE == "head":
            yt *= tl.exp2(entering)[:, None]
            if exact:
                past = tl.where(tl.trans(reach), tl.zeros([64, 64], gates.dtype), gates[:, None])
                gaps = gate_sums(reach, past, TERMS)
            else:
                gaps = tl.minimum(entering[:, None] - entering[None, :], 0.0)
            scores *= tl.exp2(gaps)
        if REVERSE and GATE != "channel" and features is None:
            scores *= scale
        yt = product(operand(tl.where(seen, scores, 0.0), PRECISION), ut, yt, PRECISION)
        if not REVERSE and features is None:
            yt *= scale
        store_tile(y, yt, batch, row, head, column, end, V, BLOCK_V, TMA)
    if last is not None:
        for i in tl.static_range(blocks_k):
            inside = (i * BLOCK_K + keys < K) & (columns < V) & (head % STATE_SHARE == 0)
            tl.store(last + state + i * BLOCK_K * V, S[i], mask=inside)
