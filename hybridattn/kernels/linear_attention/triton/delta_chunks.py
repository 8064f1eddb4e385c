"""What the kernels of the chunked gated delta rule have in common, and the kernel that solves each chunk's system.

B batch, T time, N sequences, K key dim, V value dim. Per chunk of 64 tokens, with b the running sum of the gates, S the
state before the chunk, and the scores of the keys L[t,s] = (k_t 2^b_t) . (k_s 2^-b_s) for s < t, else 0:

    x   = v - (k 2^b) S
    r   = x - M diag(beta) x,   M = L (I + diag(beta) L)^-1,   u = diag(beta) r
    o_t = scale * (q_t 2^b_t) S + scale * sum_{s<=t} [ (q_t 2^b_t) . (k_s 2^-b_s) ] u_s
    S  <- D S + (k 2^(bits - b))^T u

(Yang et al., "Gated Delta Networks" (2025), section 3.3; Kimi Team, "Kimi Linear" (2025), section 3.) The last two
lines are gated linear attention with the values u: see ``forward``, also for hot channels. r is the difference between
a value and what the state, with the earlier tokens of the chunk, holds for its key. M gives r also where beta is 0.

    solve_chunks     (this file) computes M of every chunk and head, 64 numbers per token
    sweep_delta      (``delta_forward``) computes u and, with the state in registers, o or the states before all chunks
    sweep_gradients  (``delta_backward``) carries the gradient of the state backwards and computes dv and dbeta
    delta_gradients  (``delta_backward``) computes the gradients of q, k and g

``sweep_delta`` leaves out the contribution of hot channels to the scores, as ``forward`` does. Here the values u depend
on the scores of the keys with each other, so ``solve_chunks`` adds the contribution before it inverts. It also stores
the contribution to the scores of the queries, in the chunks that have hot channels. Chunks without hot channels neither
write nor read these scores.

Queries and keys that the kernels normalise are scaled after the products: the scores by columns and rows, the rows of
u and o. No normalised copy is stored.
"""

# pyright: reportGeneralTypeIssues=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

from .hot_channels import hot_scores
from .primitives import COOL, bounded, find_sequence, gate_sums, load_gates, load_tile, operand, product, store_tile


# ---------------------------------------------------------------------------------------------------- device functions
@triton.jit
def find_slot(cu_seqlens, slot, T, sequences):
    """Return the batch row, first token and end of the chunk in a slot; an unused slot's first token is past its end.

    The slots of sequence n begin at ``slot`` of ``find_sequence``, which increases with n: a binary search finds n.
    """
    if cu_seqlens is None:
        n = slot // tl.cdiv(T, 64)
    else:
        n, beyond = slot * 0, slot * 0 + sequences
        while beyond - n > 1:
            middle = (n + beyond) // 2
            reached = tl.load(cu_seqlens + middle).to(tl.int32) // 64 + middle <= slot
            n, beyond = tl.where(reached, middle, n), tl.where(reached, beyond, middle)
    batch, start, end, first = find_sequence(cu_seqlens, n, T, 1)
    return batch, start + (slot - first) * 64, end


@triton.jit
def load_vector(x, batch, row, head, end):
    """Load one number per token and head, fp32 [64]; zeros from token ``end`` on. x is a tuple: see ``primitives``."""
    t = tl.arange(0, 64)
    corner = x[0] + tl.cast(batch, tl.int64) * x[1] + tl.cast(row, tl.int64) * x[2] + tl.cast(head, tl.int64) * x[3]
    return tl.load(corner + t * x[2], mask=row + t < end, other=0.0).to(tl.float32)


@triton.jit
def store_vector(x, value, batch, row, head, end):
    """Store ``value`` [64], one number per token, up to token ``end``."""
    t = tl.arange(0, 64)
    corner = x[0] + tl.cast(batch, tl.int64) * x[1] + tl.cast(row, tl.int64) * x[2] + tl.cast(head, tl.int64) * x[3]
    tl.store(corner + t * x[2], value.to(x[0].dtype.element_ty), mask=row + t < end)


@triton.jit
def load_sums(g, batch, row, head, column, end, K, TERMS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Load gates per channel [64,BLOCK_K]; return them, their running sums in bits, and the sums of all [BLOCK_K]."""
    t = tl.arange(0, 64)
    gt = bounded(load_tile(g, batch, row, head, column, end, K, BLOCK_K, TMA))
    sums = gate_sums(t[:, None] >= t[None, :], gt, TERMS)
    return gt, sums, tl.min(sums, 0)  # no gate is positive, so the sum of all gates is the least running sum


@triton.jit
def key_exponents(gt, sums, bits, is_hot, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return the exponents of the keys, [64,BLOCK_K]: -b, or bits - b for hot channels."""
    t = tl.arange(0, 64)
    if EXACT:
        exponents = tl.where(is_hot[None, :], gate_sums(t[:, None] < t[None, :], gt, TERMS), -sums)
    else:  # 16-bit operands round more than this difference of running sums
        exponents = tl.where(is_hot, bits, 0.0)[None, :] - sums
    return exponents


@triton.jit
def head_sums(g, batch, row, head, end, TERMS: tl.constexpr):
    """Load the gates of a head; return their sums in bits: up to each token [64], after each token [64], of all."""
    t = tl.arange(0, 64)
    upto = t[:, None] >= t[None, :]
    gates = load_gates(g, batch, row, head, end)
    repeated = gates[:, None] + tl.zeros([64, 16], gates.dtype)
    entering = tl.max(gate_sums(upto, repeated, TERMS), 1)
    leaving = tl.max(gate_sums(upto == 0, repeated, TERMS), 1)
    return entering, leaving, tl.min(entering)


@triton.jit
def head_gaps(g, entering, batch, row, head, end, TERMS: tl.constexpr, EXACT: tl.constexpr):
    """Return the sums of the gates after the column's token up to the row's, in bits [64,64]; 0 if it is earlier.

    ``entering`` are the sums up to each token, from ``head_sums``.
    """
    t = tl.arange(0, 64)
    if EXACT:
        gates = load_gates(g, batch, row, head, end)
        past = tl.where(t[:, None] > t[None, :], gates[:, None], tl.zeros([64, 64], gates.dtype))
        gaps = gate_sums(t[:, None] >= t[None, :], past, TERMS)
    else:  # 16-bit operands round more than this difference of running sums
        gaps = tl.minimum(entering[:, None] - entering[None, :], 0.0)
    return gaps


@triton.jit
def inverse_norms(x):
    """Return 1 / sqrt(sum of squares + 1e-6) from the sums of squares."""
    return tl.rsqrt(x + 1e-6)


@triton.jit
def unit_inverse(A, PRECISION: tl.constexpr):
    """Compute (I + A)^-1, fp32 [64,64]; A holds zeros on and above the diagonal.

    The diagonal blocks of 16 rows are inverted by forward substitution. Then blocks double twice. Of a block with the
    inverse X of its two diagonal halves and the lower left part C, the inverse is X - X C X. The factors are parts of
    A and of the inverse. The product (I - A)(I + A^2)(I + A^4).. has other factors: for equal keys and beta = 1 the
    powers of A exceed the inverse by 1e17.
    """
    block, r = tl.arange(0, 4), tl.arange(0, 16)
    own = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(own, tl.reshape(A, [4, 16, 4, 16]), 0.0), 2)
    X = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros([4, 16, 16], tl.float32)
    for i in range(1, 16):
        row = tl.sum(tl.where(r[None, :, None] == i, diagonal, 0.0), 1)
        X -= tl.where(r[None, :, None] == i, tl.sum(row[:, :, None] * X, 1)[:, None, :], 0.0)
    X = tl.reshape(tl.where(own, X[:, :, None, :], 0.0), [64, 64])
    t = tl.arange(0, 64)
    for half in tl.static_range(4, 6):
        left, right = (t >> half)[None, :], (t >> half)[:, None]
        C = tl.where((left + 1 == right) & (left % 2 == 0), A, 0.0)
        x = operand(X, PRECISION)
        CX = product(operand(C, PRECISION), x, tl.zeros([64, 64], tl.float32), PRECISION)
        X -= product(x, operand(CX, PRECISION), tl.zeros([64, 64], tl.float32), PRECISION)
    return X


# --------------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def solve_chunks(
    q,  # [B,T,*,K]; q to ``pairs`` are tuples: see ``primitives``
    k,  # [B,T,*,K]
    g,  # gates [B,T,*,K] or [B,T,*,1], or None
    beta,  # [B,T,STATES]
    solved,  # output: M, [B,T,STATES,64]
    norms,  # output: 1 / sqrt(sum of squares + 1e-6) of the keys, fp32 [B,T,STATES]; or None
    pairs,  # output: scores of hot channels with scale 1, [B,T,STATES * GROUP,64]; only where there are any; or None
    hot,  # output: int32 [slots,STATES,K], 1 for hot channels, 0 for others; or None
    cu_seqlens,  # [N+1] or None
    T,
    sequences,
    K: tl.constexpr,
    STATES: tl.constexpr,  # heads of the state
    GROUP: tl.constexpr,  # output heads that share a state
    Q_SHARE: tl.constexpr,  # output heads that share a query head
    K_SHARE: tl.constexpr,  # heads of the state that share a key head
    G_SHARE: tl.constexpr,
    GATE: tl.constexpr,  # "", "head" or "channel"
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,  # precision of products with M and the inverse
    BLOCK_K: tl.constexpr,
):
    """Solve the system of one chunk and head."""
    exact: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    slot, head = tl.program_id(0) // STATES, tl.program_id(0) % STATES
    batch, row, end = find_slot(cu_seqlens, slot, T, sequences)
    if row >= end:
        return
    t = tl.arange(0, 64)
    scores, squares = tl.zeros([64, 64], tl.float32), tl.zeros([64], tl.float32)
    hottest = 0
    flags = hot
    if GATE == "channel":
        flags = hot + tl.program_id(0).to(tl.int64) * K
    for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        kt = load_tile(k, batch, row, head // K_SHARE, i * BLOCK_K, end, K, BLOCK_K, False)
        if norms is not None:
            squares += tl.sum(kt.to(tl.float32) * kt.to(tl.float32), 1)
        at, wt = kt, kt
        if GATE == "channel":
            gt, sums, bits = load_sums(g, batch, row, head // G_SHARE, i * BLOCK_K, end, K, TERMS, BLOCK_K, False)
            is_hot = bits < COOL
            channel = i * BLOCK_K + tl.arange(0, BLOCK_K)
            tl.store(flags + channel, is_hot.to(tl.int32), mask=channel < K)
            hottest = tl.maximum(hottest, tl.max(is_hot.to(tl.int32), 0))
            at = operand(kt * tl.exp2(sums), PRECISION)
            wt = operand(kt * tl.exp2(key_exponents(gt, sums, bits, is_hot, TERMS, exact)), PRECISION)
        scores = product(at, tl.trans(wt), scores, PRECISION)
    if GATE == "head":
        entering, _, _ = head_sums(g, batch, row, head // G_SHARE, end, TERMS)
        scores *= tl.exp2(head_gaps(g, entering, batch, row, head // G_SHARE, end, TERMS, exact))
    if GATE == "channel":
        if hottest > 0:
            tl.debug_barrier()  # other threads of the program stored the flags
            key_head, gate_head = head // K_SHARE, head // G_SHARE
            scores += hot_scores(
                k, key_head, k, key_head, g, gate_head, flags, batch, row, end, 1.0, K, TERMS, PRECISION, False, BLOCK_K
            )
            for j in range(GROUP):
                output = head * GROUP + j
                queries = hot_scores(
                    q,
                    output // Q_SHARE,
                    k,
                    key_head,
                    g,
                    gate_head,
                    flags,
                    batch,
                    row,
                    end,
                    1.0,
                    K,
                    TERMS,
                    PRECISION,
                    False,
                    BLOCK_K,
                )
                store_tile(pairs, queries, batch, row, output, 0, end, 64, 64, False)
    if norms is not None:
        scale = inverse_norms(squares)
        scores *= scale[:, None] * scale[None, :]
        store_vector(norms, scale, batch, row, head, end)
    strength = load_vector(beta, batch, row, head, end)
    L = tl.where(t[:, None] > t[None, :], scores, 0.0)
    zeros = tl.zeros([64, 64], tl.float32)
    X = operand(unit_inverse(L * strength[:, None], SOLVE), SOLVE)
    M = product(operand(L, SOLVE), X, zeros, SOLVE)
    if SOLVE != "tf32":
        # One step of iterative refinement, (I + L diag(beta)) M = L: the rows of L sum the errors of the inverse.
        residual = L - M - product(L, M * strength[:, None], zeros, SOLVE)
        M += residual - product(M, residual * strength[:, None], zeros, SOLVE)
    store_tile(solved, M, batch, row, head, 0, end, 64, 64, False)
