"""The decoding kernels and op of softmax attention: a fixed number of programs divides the key tiles of all caches.

B batch, S slots of a cache, n new tokens, H key heads, Hq query heads, D key dim, V value dim. The n queries of the
Hq / H heads that share a key head are the rows of one tile, or of several if they are many. So keys are read once per
tile. A *segment* is one such tile of rows with all its key tiles. The key tiles of all segments, in order, are divided
into *shares*, one per program, which differ by at most one tile for any lengths. "Stream-K" (Osama et al., 2023)
divides matrix products the same way.

If one share contains a whole segment, its program writes the result. Otherwise every program stores its part of the
segment, unnormalised, with its maximum and sum in base 2. A second kernel adds the parts in a fixed order. Only the
programs read the lengths, so nothing synchronises, and the grid depends on shapes alone.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.architectures import architecture, launching, warn_of_launch
from ...runtime.opaque_ops import opaque_op
from ..options import Options
from .launch import DecodeLaunch, decode_launch
from .operands import dense, score_numbers
from .primitives import LN2, LOG2E, LOWEST, tile_scores, visible


@triton.jit
def row_of_batch(length, start, slots, NEW: tl.constexpr, LEFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a row's first position that a query attends to, the first key tile, and the number of key tiles.

    Tiles are tiles of slots. A ring buffer that has wrapped around uses all of its tiles.
    """
    if LEFT is not None:
        start = tl.maximum(start, length - NEW - LEFT)
    start = tl.maximum(start, 0)
    low = tl.where(length > slots, 0, start // BLOCK_N)
    high = tl.cdiv(tl.minimum(length, slots), BLOCK_N)
    return start, low, tl.maximum(high - low, 0)


@triton.jit
def tiles_before(
    lengths,
    starts,
    batches,
    slots,
    SEGMENTS: tl.constexpr,
    NEW: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute the cumulative number of key tiles of the rows' segments, int64 [BLOCK_B]."""
    rows = tl.arange(0, BLOCK_B)
    length = tl.load(lengths + rows, mask=rows < batches, other=0).to(tl.int32)
    start = tl.zeros([BLOCK_B], tl.int32)
    if starts is not None:
        start = tl.load(starts + rows, mask=rows < batches, other=0).to(tl.int32)
    _, _, count = row_of_batch(length, start, slots, NEW, LEFT, BLOCK_N)
    return tl.cumsum(count.to(tl.int64) * SEGMENTS, 0)


@triton.jit
def store_rows(
    o,
    lse,
    sinks,
    acc,
    top,
    total,
    batch,
    kv_head,
    rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NEW: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the sinks, then write o and lse.

    ``acc`` [M,BLOCK_V] is the sum of values with weights 2^(score - top), ``total`` [M] the sum of the weights.
    """
    inside = rows < GROUP * NEW
    head = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, BLOCK_V)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        kept = tl.exp2(top - higher)
        acc *= kept[:, None]
        total = total * kept + tl.exp2(sink - higher)
        top = higher
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    place = (batch.to(tl.int64) * NEW + rows // GROUP) * HEADS + head
    tl.store(
        o + place[:, None] * V + columns[None, :],
        (acc / total[:, None]).to(o.dtype.element_ty),
        mask=inside[:, None] & (columns < V)[None, :],
    )
    tl.store(lse + place, tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["scale", "softcap", "batches", "slots", "programs"])
def decode_kernel(
    q,
    k,
    v,
    lengths,
    starts,
    alibi_slopes,
    sinks,
    o,
    lse,
    sums,
    tops,
    totals,
    scale,
    softcap,
    batches,
    slots,
    programs,
    q_batch,
    q_time,
    q_head,
    k_batch,
    k_time,
    k_head,
    v_batch,
    v_time,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NEW: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the tiles of one share.

    The parts of divided segments go to ``sums`` [2 programs,BLOCK_M,BLOCK_V], ``tops`` and ``totals`` [2 programs,
    BLOCK_M]. A program has at most two: the end of the segment that its share starts in, and the beginning of the
    segment that its share ends in.
    """
    ALIBI: tl.constexpr = alibi_slopes is not None  # pyright: ignore[reportAssignmentType]
    ROW_TILES: tl.constexpr = (GROUP * NEW + BLOCK_M - 1) // BLOCK_M
    SEGMENTS: tl.constexpr = HEADS // GROUP * ROW_TILES  # per row of the batch
    factor = 1.0 if SOFTCAP or ALIBI else scale
    program = tl.program_id(0).to(tl.int64)
    ends = tiles_before(lengths, starts, batches, slots, SEGMENTS, NEW, LEFT, BLOCK_N, BLOCK_B)
    work = tl.max(ends, 0)
    place = program * work // programs
    stop = (program + 1) * work // programs
    while place < stop:
        batch = tl.sum((ends <= place).to(tl.int32), 0)
        length = tl.load(lengths + batch).to(tl.int32)
        start = 0
        if starts is not None:
            start = tl.load(starts + batch).to(tl.int32)
        found = row_of_batch(length, start, slots, NEW, LEFT, BLOCK_N)
        start, low, count = found  # pyright: ignore[reportGeneralTypeIssues]
        within = place - (tl.sum(tl.where(tl.arange(0, BLOCK_B) == batch, ends, 0), 0) - count.to(tl.int64) * SEGMENTS)
        segment = (within // count).to(tl.int32)
        first = (within % count).to(tl.int32)
        steps = tl.minimum(count - first, stop - place).to(tl.int32)
        kv_head = segment // ROW_TILES
        rows = segment % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < GROUP * NEW
        head = kv_head * GROUP + rows % GROUP
        t = length - NEW + rows // GROUP
        columns = tl.arange(0, BLOCK_D)
        query = tl.load(
            q + batch.to(tl.int64) * q_batch + (rows // GROUP * q_time + head * q_head)[:, None] + columns[None, :],
            mask=inside[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        slope = tl.zeros([BLOCK_M], tl.float32)
        if ALIBI:
            slope = tl.load(alibi_slopes + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        k_start = k + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
        v_start = v + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
        value_columns = tl.arange(0, BLOCK_V)
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for n in tl.range(low + first, low + first + steps, num_stages=STAGES):
            slot = n * BLOCK_N + tl.arange(0, BLOCK_N)
            s = slot  # position of a slot; after a ring buffer has wrapped, the newest one of the slot
            if length > slots:
                s = length - 1 - (length - 1 - slot) % slots
            known = (slot < tl.minimum(length, slots)) & (s >= start)  # other slots may hold anything
            key = tl.load(
                k_start + slot.to(tl.int64)[:, None] * k_time + columns[None, :],
                mask=known[:, None] & (columns < D)[None, :],
                other=0.0,
            )
            value = tl.load(
                v_start + slot.to(tl.int64)[:, None] * v_time + value_columns[None, :],
                mask=known[:, None] & (value_columns < V)[None, :],
                other=0.0,
            )
            scores = tl.dot(query, key.T, input_precision=PRECISION)
            scores, _ = tile_scores(scores, t[:, None], s[None, :], scale, softcap, slope[:, None], SOFTCAP, ALIBI)
            seen = known[None, :] & visible(t[:, None], s[None, :], length, LEFT, 0)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - higher[:, None])
            kept = tl.exp2(top - higher)
            total = total * kept + tl.sum(weights, 1)
            acc = tl.dot(weights.to(value.dtype), value, acc * kept[:, None], input_precision=PRECISION)
            top = higher
        if steps == count:
            store_rows(o, lse, sinks, acc, top, total, batch, kv_head, rows, HEADS, GROUP, NEW, V, BLOCK_V)
        else:
            part = (2 * program + (first == 0).to(tl.int64)) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(sums + part[:, None] * BLOCK_V + value_columns[None, :], acc)
            tl.store(tops + part, top)
            tl.store(totals + part, total)
        place += steps


@triton.jit(do_not_specialize=["batches", "slots", "programs"])
def merge_kernel(
    lengths,
    starts,
    sinks,
    o,
    lse,
    sums,
    tops,
    totals,
    batches,
    slots,
    programs,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NEW: tl.constexpr,
    LEFT: tl.constexpr,
    V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the sum of one segment's parts; nothing if one share contained the segment, zeros if it has no tiles."""
    ROW_TILES: tl.constexpr = (GROUP * NEW + BLOCK_M - 1) // BLOCK_M
    SEGMENTS: tl.constexpr = HEADS // GROUP * ROW_TILES
    segment, batch = tl.program_id(0) % SEGMENTS, tl.program_id(0) // SEGMENTS
    ends = tiles_before(lengths, starts, batches, slots, SEGMENTS, NEW, LEFT, BLOCK_N, BLOCK_B)
    work = tl.max(ends, 0)
    length = tl.load(lengths + batch).to(tl.int32)
    start = 0
    if starts is not None:
        start = tl.load(starts + batch).to(tl.int32)
    found = row_of_batch(length, start, slots, NEW, LEFT, BLOCK_N)
    _, _, count = found  # pyright: ignore[reportGeneralTypeIssues]
    after = tl.sum(tl.where(tl.arange(0, BLOCK_B) == batch, ends, 0), 0)
    first = after - (SEGMENTS - segment) * count.to(tl.int64)
    # Tile i is in the share of the largest p with p * work // programs <= i.
    some = tl.maximum(work, 1)
    first_program = ((first + 1) * programs - 1) // some
    last_program = tl.where(count > 0, ((first + count) * programs - 1) // some, first_program - 1)
    if first_program == last_program:
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for program in range(first_program, last_program + 1):
        has = program * work // programs < (program + 1) * work // programs
        part = (2 * program + (program == first_program).to(tl.int64)) * BLOCK_M + rows
        part_top = tl.load(tops + part, mask=rows < has.to(tl.int32) * BLOCK_M, other=LOWEST)
        part_total = tl.load(totals + part, mask=rows < has.to(tl.int32) * BLOCK_M, other=0.0)
        part_sums = tl.load(
            sums + part[:, None] * BLOCK_V + columns[None, :],
            mask=(rows < has.to(tl.int32) * BLOCK_M)[:, None],
            other=0.0,
        )
        higher = tl.maximum(top, part_top)
        kept, added = tl.exp2(top - higher), tl.exp2(part_top - higher)
        total = total * kept + part_total * added
        acc = acc * kept[:, None] + part_sums * added[:, None]
        top = higher
    rows += segment % ROW_TILES * BLOCK_M
    store_rows(o, lse, sinks, acc, top, total, batch, segment // ROW_TILES, rows, HEADS, GROUP, NEW, V, BLOCK_V)


@opaque_op("hybridattn::flash_decode_triton")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    scale: float,
    left: int | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    programs: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute o [B,n,Hq,V] in v's dtype and lse [B,n,Hq] in fp32 over caches [B,S,H,..].

    ``programs`` is the number of shares; None takes the launch row's number per multiprocessor.
    """
    (batches, new, heads, key_dim), (slots, kv_heads, value_dim) = q.shape, v.shape[1:]
    o, lse = v.new_empty(batches, new, heads, value_dim), q.new_empty(batches, new, heads, dtype=torch.float32)
    if not lse.numel():
        return o, lse
    group = heads // kv_heads
    launch = _launch(q.device, group * new, key_dim, value_dim, 8 * q.itemsize)
    programs = programs or launch.programs * _multiprocessors(q.device)
    if scale <= 0:  # the kernel takes the maximum before it applies the scale
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    lengths, (starts, alibi_slopes, sinks) = lengths.contiguous(), map(dense, (starts, alibi_slopes, sinks))
    sums = q.new_empty(2 * programs, launch.block_m, launch.block_v, dtype=torch.float32)
    tops, totals = q.new_empty(2, 2 * programs, launch.block_m, dtype=torch.float32)

    constexprs = {
        **decode_constexprs(launch, key_dim, value_dim),
        "HEADS": heads,
        "GROUP": group,
        "NEW": new,
        "LEFT": left,
        "SOFTCAP": softcap is not None,
        "BLOCK_B": triton.next_power_of_2(batches),
    }
    with launching(launch.name, q):
        decode_kernel[(programs,)](
            *(q, k, v, lengths, starts, alibi_slopes, sinks, o, lse, sums, tops, totals),
            *(*score_numbers(scale, softcap), batches, slots, programs),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            **constexprs,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
            num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
        )
    segments = batches * kv_heads * -(-group * new // launch.block_m)
    with launching(launch.name, q):
        merge_kernel[(segments,)](
            *(lengths, starts, sinks, o, lse, sums, tops, totals, batches, slots, programs),
            **{name: x for name, x in constexprs.items() if name in merge_kernel.arg_names},
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )
    return o, lse


@attend.register_fake
def _(q, k, v, *_):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def decode_constexprs(launch: DecodeLaunch, key_dim: int, value_dim: int) -> dict[str, Any]:
    """Return the constexprs that depend on dims and launch row."""
    return {
        "D": key_dim,
        "V": value_dim,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": launch.block_d,
        "BLOCK_V": launch.block_v,
        "PRECISION": launch.precision,
        "STAGES": launch.num_stages,
    }


@cache
def _launch(device: torch.device, rows: int, key_dim: int, value_dim: int, bits: int) -> DecodeLaunch:
    """Return the launch row; on a GPU, warn once if the row is not verified there."""
    name = architecture(device)
    launch = decode_launch(name, rows, key_dim, value_dim, bits)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch


@cache
def _multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, options: Options, with_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute o [B,n,Hq,V] and lse [B,n,Hq] of the n newest tokens over caches [B,S,H,..]."""
    o = options
    return attend(q, k, v, lengths, starts, o.scale, o.left, o.alibi_slopes, o.sinks, o.softcap, None)
