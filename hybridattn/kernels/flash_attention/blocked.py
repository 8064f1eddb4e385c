"""The torch backend of softmax attention: PyTorch's fused kernel, or blocks of queries over tiles of keys.

Full attention, causal attention and causal windows without further options (``Options.plain``) run on PyTorch's fused
kernel, with PyTorch's autograd. All other calls (options, windows to both sides, log-sum-exp) run in one opaque op.
There, a block of queries visits the tiles of keys that some of its queries attend to, with a running maximum and sum.
The backward pass recomputes the weights from the log-sum-exp (Dao, "FlashAttention-2", 2023, algorithms 1 and 2). The
options change the score function of a tile and its derivative.

B batch, H key/value heads, G query heads per key head, R = B * H rows, D key dim, V value dim. The G query heads that
share a key head are concatenated to the rows of one matrix, so that keys are not repeated.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.opaque_ops import opaque_op
from ..runtime.sequences import sequence_slices
from .options import BlockMask, Options, by_sequence, positions, visible

BLOCK = 512  # queries per call of the fused kernel with a mask: bounds the size of the mask
TILE = 1 << 17  # scores, of all rows together, computed at a time: they fit the second-level cache of a core
CUT = {torch.float32: -60.0, torch.float64: -600.0}  # natural log of the smallest nonzero weight; the largest is 1
NOWHERE = torch.iinfo(torch.int64).max // 2  # position of a slot that no query may attend to


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute o [B,Tq,Hq,V] and, with ``with_lse``, lse [B,Tq,Hq] from q [B,Tq,Hq,D], k [B,Tk,H,D], v [B,Tk,H,V]."""
    # While tracing, the offsets of packed rows have no values; the opaque op can read them.
    if not options.plain or with_lse or (cu_seqlens_q is not None and torch.compiler.is_compiling()):
        return forward(q, k, v, None, None, *options.flat(), cu_seqlens_q, cu_seqlens_k)
    window = None if options.left is None else options.left + 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return _fused(q, k, v, options.right == 0, window, options.scale), None

    if cu_seqlens_q is None or cu_seqlens_k is None:
        return run(q, k, v)
    return by_sequence(run, (q, k, v), cu_seqlens_q, cu_seqlens_k)


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, options: Options, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute o [B,n,Hq,V] and, with ``with_lse``, lse [B,n,Hq] of the n newest tokens over caches [B,S,H,..]."""
    queries, slots, plain = q.shape[1], torch.arange(k.shape[1], device=q.device), options.plain and not with_lse
    if plain and queries == 1 and options.left is None and starts is None:  # all slots, in any order
        return _fused_decode(q, k, v, (slots < lengths[:, None])[:, None], options.scale), None
    t = lengths[:, None] + torch.arange(-queries, 0, device=q.device)
    newest = lengths[:, None] - 1
    s = newest - (newest - slots) % max(k.shape[1], 1)  # the newest position of each slot
    s = s.masked_fill(s < (0 if starts is None else starts[:, None].clamp(min=0)), NOWHERE)
    if plain:
        return _fused_decode(q, k, v, visible(t, s, options.left, 0), options.scale), None
    return forward(q, k, v, t, s, *options.flat(), None, None)


# ----------------------------------------------------------------------------------------------- PyTorch's fused kernel
def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """Compute o [B,Tq,Hq,V] with PyTorch's fused kernel."""
    queries, keys = q.shape[1], k.shape[1]
    if causal and queries > keys:  # queries before the first key
        seen = _fused(q[:, queries - keys :], k, v, True, window, scale)
        return F.pad(seen, (0, 0, 0, 0, queries - keys, 0))
    if q.shape[3] == 0:
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))  # all scores are 0
    if q.numel() == 0 or v.numel() == 0:  # no keys or no outputs: gradients are 0
        return q.new_zeros(*q.shape[:3], v.shape[3]) + sum(x.flatten()[:0].sum() for x in (q, k, v))
    if window is not None and window < keys:
        return _windowed(q, k, v, window, scale)
    if not causal or queries == keys:
        return _sdpa(q, k, v, None, causal and queries > 1, scale)
    t, s = positions(queries, keys, q.device)
    parts = []
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        reach = keys - queries + last
        mask = visible(t[first:last], s[:reach], None, 0)
        parts.append(_sdpa(q[:, first:last], k[:, :reach], v[:, :reach], mask, False, scale))
    return torch.cat(parts, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if scale <= 0:  # PyTorch's CPU kernel multiplies its causal mask's -inf by the scale
        q, scale = q * scale, 1.0
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _fused_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute o [B,n,Hq,V] with a mask [B,n,S].

    Queries that share a key head are rows of one matrix, so keys are read once.
    """
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    rows = q.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    o = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, group, 1)[:, None], scale=scale)
    return o.unflatten(2, (group, q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Compute causal attention of every query to the last ``window`` keys; Tq <= Tk.

    Blocks of queries, each with the keys in its window, become entries of one batch.
    """
    batch, queries, heads, dim = q.shape
    past = k.shape[1] - queries
    first = min(max(window - 1 - past, 0), queries)  # queries whose window includes all earlier keys
    start = _fused(q[:, :first], k[:, : past + first], v[:, : past + first], True, None, scale)
    if first == queries:
        return start
    size = min(max(window, 64), BLOCK, queries - first)
    blocks = -(-(queries - first) // size)
    reach = size + window - 1  # keys in the windows of a block
    after = first + blocks * size - queries
    k, v = (F.pad(x[:, past + first - window + 1 :], (0, 0, 0, 0, 0, after)) for x in (k, v))
    k, v = (x.unfold(1, reach, size).movedim(-1, 2).flatten(0, 1) for x in (k, v))
    q = F.pad(q[:, first:], (0, 0, 0, 0, 0, after)).reshape(batch * blocks, size, heads, dim)
    mask = visible(*positions(size, reach, q.device), window - 1, 0)
    rest = _sdpa(q, k, v, mask, False, scale).reshape(batch, blocks * size, heads, -1)
    return torch.cat((start, rest[:, : queries - first]), 1)


# ------------------------------------------------------------------------------------------------------ tiles to visit
Tile = tuple[slice, bool]  # keys, and whether some of their scores have to be masked
Plan = list[tuple[slice, list[Tile]]]  # blocks of queries, each with its tiles


def _plan(queries: int, keys: int, heads: int, options: Options) -> Plan:
    """Divide the queries into blocks, and list the tiles of keys that some query of a block attends to."""
    left, right, past = options.left, options.right, keys - queries
    side = 64  # the largest power of two up to 512 with which a tile of all heads has at most TILE scores
    while side < 512 and 4 * side * side * max(heads, 1) <= TILE:
        side *= 2
    width = side if left is None or right is None else left + right + 1
    rows = min(side, max(64, width))  # blocks larger than the window would mask most scores
    columns = max(side, TILE // max(1, heads * rows))
    plan = []
    for block, spans in _blocks(queries, keys, options.block_mask):
        for first in range(block.start, block.stop, rows):
            last = min(first + rows, block.stop)
            low = 0 if left is None else max(0, first + past - left)
            high = keys if right is None else min(keys, last + past + right)
            inner_low = 0 if left is None else last - 1 + past - left  # every query attends to keys inner_low ..
            inner_high = keys if right is None else first + past + right + 1  # .. inner_high - 1
            tiles = []
            for a, b in spans:
                tiles += _tiles(max(a, low), min(b, high), columns, inner_low, inner_high)
            plan.append((slice(first, last), tiles))
    return plan


def _tiles(first: int, last: int, step: int, inner_first: int = 0, inner_last: int = 0) -> list[Tile]:
    """Divide keys first .. last - 1 into tiles; tiles within inner_first .. inner_last - 1 need no mask."""
    ends = [*range(first, last, step), last] if first < last else []
    return [(slice(a, b), not inner_first <= a < b <= inner_last) for a, b in pairwise(ends)]


def _blocks(queries: int, keys: int, mask: BlockMask | None) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Return blocks of queries with the spans of keys that are live for them; adjacent spans are joined."""
    if mask is None:
        return [(slice(0, queries), [(0, keys)])]
    offsets, key_blocks, size = mask.offsets.tolist(), mask.key_blocks.tolist(), mask.block_size
    blocks = []
    for i, (a, b) in enumerate(pairwise(offsets)):
        spans: list[tuple[int, int]] = []
        for j in key_blocks[a:b]:
            first, last = j * size, min((j + 1) * size, keys)
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, last))
        blocks.append((slice(i * size, min((i + 1) * size, queries)), spans))
    return blocks


class _Shape(NamedTuple):
    """The conversion between tensors [B,n,H*G,D] and rows [B*H,G*n,D]."""

    batch: int
    heads: int
    group: int

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.unflatten(2, (self.heads, self.group)).permute(0, 2, 3, 1, 4)
        return x.reshape(self.batch * self.heads, self.group * x.shape[3], x.shape[4]).to(dtype)

    def join(self, rows: Tensor, out: Tensor) -> None:
        """Write rows [B*H,G*n,D] to out [B,n,H*G,D]."""
        x = rows.view(self.batch, self.heads, self.group, *out.shape[1::2])
        out.unflatten(2, (self.heads, self.group)).copy_(x.permute(0, 3, 1, 2, 4))


def _shapes(q: Tensor, k: Tensor) -> tuple[_Shape, _Shape]:
    """Return the conversions of tensors with the heads of q, and of tensors with the heads of k."""
    batch, heads = q.shape[0], k.shape[2]
    return _Shape(batch, heads, q.shape[2] // heads), _Shape(batch, heads, 1)


@dataclass(frozen=True)
class Scores:
    """The score function of a call.

    Attributes:
        options: the options of the call.
        t: positions of the queries, [1 or B,Tq].
        s: positions of the keys, [1 or B,Tk].
        plan: the tiles to visit.
    """

    options: Options
    t: Tensor
    s: Tensor
    plan: Plan

    @property
    def factor(self) -> float:
        """The factor by which the caller of ``of`` multiplies the queries."""
        return self.options.scale / (1.0 if self.options.softcap is None else self.options.softcap)

    def of(self, q: Tensor, k: Tensor, shape: _Shape, queries: slice, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Compute the scores [R,G*n,m] of a tile, and the tanh that ``backward_`` needs (None without softcap).

        Args:
            q: rows of queries [R,G*n,D], already multiplied by ``factor``.
            k: rows of keys [R,m,D].
            shape: conversion of tensors with the heads of q.
            queries: slice of the queries.
            tile: the tile.
        """
        keys, masked = tile
        scores, tanh = torch.bmm(q, k.mT), None
        if self.options.softcap is not None:
            tanh = scores.tanh_()
            scores = tanh * self.options.softcap
        t, s = self.t[:, queries], self.s[:, keys]
        by_head = scores.view(shape.batch, shape.heads, shape.group, *t.shape[1:], *s.shape[1:])
        if self.options.alibi_slopes is not None:
            slopes = self.options.alibi_slopes.to(scores.dtype).view(shape.heads, shape.group, 1, 1)
            distance = (t[:, :, None] - s[:, None]).abs().to(scores.dtype)
            by_head.addcmul_(slopes, distance[:, None, None], value=-1)
        if masked:
            hidden = visible(t, s, self.options.left, self.options.right).logical_not_()
            by_head.masked_fill_(hidden[:, None, None], -torch.inf)
        return scores, tanh

    def backward_(self, dscores: Tensor, tanh: Tensor | None) -> Tensor:
        """Change the gradient of the scores, in place, to that of the products of queries and keys."""
        if tanh is not None and self.options.softcap is not None:
            dscores.mul_(tanh.square_().sub_(1).mul_(-self.options.softcap))
        return dscores


# ------------------------------------------------------------------------------------------------- forward and backward
def _exp_(x: Tensor) -> Tensor:
    """Compute exp of x <= 0 in place, with 0 for results below e^CUT, which do not change any sum.

    Slopes often make weights far smaller than that. A CPU is about a hundred times slower on subnormal numbers, and
    also slow for exp of -inf (masked scores).
    """
    cut = CUT[x.dtype]
    return torch.threshold_(x.clamp_(min=cut - 1).exp_(), math.exp(cut), 0)


class _Part(NamedTuple):
    """One sequence of a call: slices of its queries and keys, and its score function."""

    queries: slice
    keys: slice
    scores: Scores


def _parts(q: Tensor, k: Tensor, t: Tensor | None, s: Tensor | None, options: Options, cu_q, cu_k) -> list[_Part]:
    """Return every packed sequence as a part, or the whole batch as one part.

    With positions t and s (a cache) the tiles cover all slots.
    """
    heads, queries, keys = q.shape[0] * q.shape[2], q.shape[1], k.shape[1]
    if t is not None and s is not None:
        tiles = _tiles(0, keys, max(64, TILE // max(1, heads * queries)))
        return [_Part(slice(0, queries), slice(0, keys), Scores(options, t, s, [(slice(0, queries), tiles)]))]
    spans = [(slice(0, queries), slice(0, keys))]
    if cu_q is not None:
        spans = zip(sequence_slices(cu_q), sequence_slices(cu_k), strict=True)
    parts = []
    for of_q, of_k in spans:
        lengths = of_q.stop - of_q.start, of_k.stop - of_k.start
        t, s = positions(*lengths, q.device)
        parts.append(_Part(of_q, of_k, Scores(options, t[None], s[None], _plan(*lengths, heads, options))))
    return parts


@opaque_op("hybridattn::flash_attention_blocked")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    s: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    block_offsets: Tensor | None,
    key_blocks: Tensor | None,
    block_size: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute o [B,Tq,Hq,V] in v's dtype and lse [B,Tq,Hq]; zeros and -inf for queries of no sequence.

    Args:
        q, k, v: [B,Tq,Hq,D], [B,Tk,H,D], [B,Tk,H,V].
        t, s: positions of queries [B,Tq] and of keys [B,Tk]; None both for sequences without a cache.
        scale to block_size: the values of ``Options.flat``.
        cu_seqlens_q, cu_seqlens_k: offsets of packed sequences [N+1], or None.
    """
    options = Options.of(scale, left, right, alibi_slopes, sinks, softcap, block_offsets, key_blocks, block_size)
    o = v.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=compute_dtype(q, k, v))
    with no_autocast(q):
        for part in _parts(q, k, t, s, options, cu_seqlens_q, cu_seqlens_k):
            _forward(q, k, v, part, o, lse)
    return o, lse


@forward.register_fake
def _(q, k, v, *_):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q, k, v))


def _forward(q: Tensor, k: Tensor, v: Tensor, part: _Part, o: Tensor, lse: Tensor) -> None:
    """Write the outputs and log-sum-exps of a part; the running sum of every query starts with the sink."""
    q, k, v, o, lse = q[:, part.queries], k[:, part.keys], v[:, part.keys], o[:, part.queries], lse[:, part.queries]
    scores, dtype, (batch, _, query_heads, _) = part.scores, lse.dtype, q.shape
    sinks, (of_q, of_k) = scores.options.sinks, _shapes(q, k)
    start = lse.new_full((query_heads, 1), -torch.inf) if sinks is None else sinks.to(dtype)[:, None]
    k, v = of_k.rows(k, dtype), of_k.rows(v, dtype)
    # The running maximum starts with a finite number, so that no difference is NaN and sums over no keys are 0.
    lowest = torch.finfo(dtype).min
    for t, tiles in scores.plan:
        q_rows = of_q.rows(q[:, t], dtype) * scores.factor
        sink = of_q.rows(start.expand(batch, t.stop - t.start, -1, -1), dtype)
        top = sink.clamp(min=lowest)
        total, sums = (sink - top).exp_(), q_rows.new_zeros(*q_rows.shape[:2], v.shape[2])
        for tile in tiles:
            s = tile[0]
            weights, _ = scores.of(q_rows, k[:, s], of_q, t, tile)
            higher = torch.maximum(top, weights.amax(-1, keepdim=True))
            weights = _exp_(weights.sub_(higher))
            kept = _exp_(top.sub_(higher))
            total.mul_(kept).add_(weights.sum(-1, keepdim=True))
            sums.mul_(kept).baddbmm_(weights, v[:, s])
            top = higher
        of_q.join(sums.div_(total.clamp(min=1)), o[:, t])  # a total is 0 (no keys) or >= 1 (the maximum's weight)
        of_q.join(total.log_().add_(top), lse[:, t, :, None])


@opaque_op("hybridattn::flash_attention_blocked_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    s: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    block_offsets: Tensor | None,
    key_blocks: Tensor | None,
    block_size: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and the sinks (empty without sinks).

    Args:
        q to cu_seqlens_k: as in ``forward``.
        o, lse: results of ``forward``.
        do, dlse: their gradients.
    """
    options = Options.of(scale, left, right, alibi_slopes, sinks, softcap, block_offsets, key_blocks, block_size)
    dq, dk, dv, dsinks = _empty_gradients(q, k, v, sinks)
    with no_autocast(q):
        delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1) - dlse
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # no keys: all weights become 0
        grads = [x.zero_() for x in (dq, dk, dv)]
        mean = None if sinks is None else torch.zeros_like(lse)
        for part in _parts(q, k, t, s, options, cu_seqlens_q, cu_seqlens_k):
            _backward(q, k, v, part, lse, do, delta, mean, *grads)
        if sinks is not None and mean is not None:
            # Not from delta: the sum over all tokens would accumulate the rounding errors of o.
            dsinks = ((sinks.to(lse.dtype) - lse).exp() * (dlse - mean)).sum((0, 1)).to(sinks.dtype)
    return dq, dk, dv, dsinks


@backward.register_fake
def _(q, k, v, *others):
    return _empty_gradients(q, k, v, others[6])


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _backward(q, k, v, part: _Part, lse, do, delta, mean: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write the gradients of a part's q, k and v, and, for every query, the weighted mean of do v^T over its keys."""
    q, lse, do, delta, dq = (x[:, part.queries] for x in (q, lse, do, delta, dq))
    mean = None if mean is None else mean[:, part.queries]
    k, v, dk, dv = (x[:, part.keys] for x in (k, v, dk, dv))
    scores, dtype, (of_q, of_k) = part.scores, lse.dtype, _shapes(q, k)
    k, v = of_k.rows(k, dtype), of_k.rows(v, dtype)
    dk_rows, dv_rows = torch.zeros_like(k), torch.zeros_like(v)
    for t, tiles in scores.plan:
        q_rows, do_rows = of_q.rows(q[:, t], dtype) * scores.factor, of_q.rows(do[:, t], dtype)
        lse_rows, delta_rows = (of_q.rows(x[:, t, :, None], dtype) for x in (lse, delta))
        dq_rows, mean_rows = torch.zeros_like(q_rows), torch.zeros_like(lse_rows)
        for tile in tiles:
            s = tile[0]
            weights, saved = scores.of(q_rows, k[:, s], of_q, t, tile)
            weights = _exp_(weights.sub_(lse_rows))
            dv_rows[:, s].baddbmm_(weights.mT, do_rows)
            dweights = torch.bmm(do_rows, v[:, s].mT)
            if mean is not None:
                mean_rows.add_((weights * dweights).sum(-1, keepdim=True))
            dscores = dweights.sub_(delta_rows).mul_(weights)
            dscores = scores.backward_(dscores, saved)
            dk_rows[:, s].baddbmm_(dscores.mT, q_rows)
            dq_rows.baddbmm_(dscores, k[:, s])
        of_q.join(dq_rows.mul_(scores.factor), dq[:, t])
        if mean is not None:
            of_q.join(mean_rows, mean[:, t, :, None])
    of_k.join(dk_rows, dk)
    of_k.join(dv_rows, dv)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


def _autograd(ctx, do, dlse):
    *tensors, o, lse = ctx.saved_tensors
    inputs = [number if x is None else x for x, number in zip(tensors, ctx.numbers, strict=True)]
    do, dlse = torch.zeros_like(o) if do is None else do, torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dsinks = backward(*inputs, o, lse, do, dlse)
    return dq, dk, dv, *[None] * 6, dsinks if dsinks.numel() else None, *[None] * 6


forward.register_autograd(_autograd, setup_context=_save)
