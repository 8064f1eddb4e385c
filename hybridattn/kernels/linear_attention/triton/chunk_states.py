"""Kernels for the states between chunks and between segments, without outputs.

    states        computes the states before all chunks (for the backward pass), or the state that each segment
                  contributes
    scan_states   computes the states before all segments from the contributions

``forward`` defines the recurrence. If a launch would have fewer programs than the device has processors, the sequences
are split into segments, each of which one program sweeps from the state before it. With REVERSE both kernels carry the
gradient of the state instead, from the last token to the first. Then q takes the place of k, and do that of v.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
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
from .taylor import load_keys


@triton.jit(do_not_specialize=["scale"])
def states(
    w,  # k, or with REVERSE q [B,T,*,K]; w and u are descriptors or tuples: see ``primitives``
    u,  # v, or with REVERSE do [B,T,*,V]
    g,  # gates [B,T,*,K], or [B,T,*,1] as a tuple, or None
    h,  # output: states before all chunks [slots,V,HEADS,K], or None
    first,  # state before the first step of the sweep, fp32 [N,*,K,V], or None for zeros
    last,  # output: state after the last step, fp32 [N,HEADS,K,V], or None
    lost,  # output: sums of the gates in bits, fp32 [N,HEADS,K], or None
    hot,  # output: int32 [slots,HEADS,K], sequence + 1 for hot channels, 0 for others; or None
    features,  # feature tables of w, see ``taylor``, or None
    cu_seqlens,  # [N+1] or None
    scale,
    T,
    segments,  # per sequence
    DIM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    W_SHARE: tl.constexpr,
    U_SHARE: tl.constexpr,
    G_SHARE: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    GATE: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_v: tl.constexpr = (V + 63) // 64
    key = tl.program_id(0) % blocks_k * BLOCK_K
    value = tl.program_id(0) // blocks_k % blocks_v * 64
    n, head = tl.program_id(0) // blocks_k // blocks_v // HEADS, tl.program_id(0) // blocks_k // blocks_v % HEADS
    batch, start, end, slot = find_sequence(cu_seqlens, n, T, segments)
    chunks = tl.cdiv(end - start, 64)
    t = tl.arange(0, 64)
    reach = (t[:, None] >= t[None, :]) if REVERSE else (t[:, None] < t[None, :])
    channel = key + tl.arange(0, BLOCK_K)

    inside = (channel < K)[None, :] & (value + t < V)[:, None]
    places = channel[None, :] * V + value + t[:, None]
    S = tl.zeros([64, BLOCK_K], tl.float32)
    if first is not None:
        state = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V
        S = tl.load(first + state + places, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_K], tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step if REVERSE else step
        row = start + c * 64
        if h is not None:
            store_tile(h, S, slot + c, value, head, key, V, K, BLOCK_K, TMA)
        wt = load_keys(w, features, batch, row, head // W_SHARE, key, end, K, DIM, BLOCK_K, BLOCK_D, PRECISION, TMA)
        ut = load_tile(u, batch, row, head // U_SHARE, value, end, V, 64, TMA)
        if REVERSE and features is None:
            wt = wt.to(tl.float32) * scale
        if GATE == "channel":
            gt = bounded(load_tile(g, batch, row, head // G_SHARE, key, end, K, BLOCK_K, TMA))
            e = gate_sums(reach, gt, TERMS)
            bits = tl.min(e if REVERSE else e + gt.to(tl.float32) * LOG2E, 0)
            if hot is not None:
                if value == 0:
                    flags = hot + ((slot + c).to(tl.int64) * HEADS + head) * K + channel
                    tl.store(flags, tl.where(bits < COOL, n // segments + 1, 0), mask=channel < K)
            wt = wt * tl.exp2(e)
            S *= tl.exp2(bits)[None, :]
            total += bits
        elif GATE == "head":
            gates = load_gates(g, batch, row, head // G_SHARE, end)
            e = tl.max(gate_sums(reach, gates[:, None] + tl.zeros([64, 16], gates.dtype), TERMS), 1)
            bits = tl.sum(gates.to(tl.float32)) * LOG2E
            wt = wt * tl.exp2(e)[:, None]
            S *= tl.exp2(bits)
            total += bits
        S = product(tl.trans(ut), operand(wt, PRECISION), S, PRECISION)
    own = (n * HEADS + head).to(tl.int64) * K
    if last is not None:
        tl.store(last + own * V + places, S, mask=inside)
    if lost is not None:
        if value == 0:
            tl.store(lost + own + channel, total, mask=channel < K)


@triton.jit
def scan_states(
    local,  # contribution of each segment to the state, fp32 [N * segments,HEADS,K,V]
    lost,  # sum of each segment's gates in bits, fp32 [N * segments,HEADS,K]
    first,  # state before the first step of the scan, fp32 [N,*,K,V], or None for zeros
    starts,  # output: states before the segments, fp32 [N * segments,HEADS,K,V]
    last,  # output: state after the last step, fp32 [N,HEADS,K,V]
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    STATE_SHARE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n, head = tl.program_id(0) // blocks // HEADS, tl.program_id(0) // blocks % HEADS
    inside = place < K * V
    S = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        state = (n * (HEADS // STATE_SHARE) + head // STATE_SHARE).to(tl.int64) * K * V
        given = inside
        if REVERSE:  # the results of heads that share a state are summed, so only one of them takes its gradient
            given &= head % STATE_SHARE == 0
        S = tl.load(first + state + place, mask=given, other=0.0)
    for step in range(segments):
        part = segments - 1 - step if REVERSE else step
        own = ((n * segments + part) * HEADS + head).to(tl.int64) * K
        tl.store(starts + own * V + place, S, mask=inside)
        decay = tl.exp2(tl.load(lost + own + place // V, mask=inside, other=0.0))
        S = S * decay + tl.load(local + own * V + place, mask=inside, other=0.0)
    tl.store(last + (n * HEADS + head).to(tl.int64) * K * V + place, S, mask=inside)
