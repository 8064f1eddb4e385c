"""The torch backend of linear attention: chunked matrix products, forward and backward, for every kind of gate.

Dimensions: R rows (one chunk of one head of one sequence each), C tokens of a chunk, K key dim, V value dim, G gates
per head (K for gates per channel, 1 for gates per head). With b the inclusive running sum of the log-decays inside a
chunk and S the state before the chunk:

    inter   o_t += (q_t * exp b_t) S
    intra   o_t += sum_{s<=t} [ sum_k q_tk k_sk exp(b_tk - b_sk) ] v_s
    state   S   <- Diag(exp b_C) S + (k * exp(b_C - b))^T v

(Yang et al., "Gated Linear Attention Transformers", section 4). Each exponential except exp b_C is the product of a
factor for the query's token and a factor for the key's token. So all work is matrix products. The factors depend on a
reference token, which depends on the gates of the row. Both choices are exact:

    cool    The reference is the chunk's middle token: q * exp(b_t - b_mid) and k * exp(b_mid - b_s), at most
            exp(+-COOL). The decay between middle and edges (``entry``, ``exit``) multiplies the states.
    hot     Where these factors could overflow, the scores are computed by halves. For a pair (t, s) in the two halves
            of a block the reference is the last token of the left half, so both factors are <= 1. This takes log2(C)
            small products.

The gradient of g_u sums, over all factors that contain exp(g_u), the factor times its gradient. In hot rows no large
terms cancel, so the gradient stays exact where its true value is of the size exp(-60).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.opaque_ops import opaque_op
from ..runtime.sequences import sequence_slices
from . import features

CHUNK = 64
SEGMENT = 1 << 18  # elements of one operand processed at a time, 1 MB in fp32: the operands fit a core's caches
COOL = 30.0  # most nats between the middle of a chunk and an edge: exp(2 * COOL) is far inside fp32, sums lose 1e-6
FLOOR = -1000.0  # finite replacement for -inf: exp(FLOOR) is 0 even in fp64


# ------------------------------------------------------------------------------------------------- chunks of sequences
@dataclass(frozen=True)
class Layout:
    """Assignment of tokens to chunks, ordered by step: the first chunks of all sequences, then the second ones, ..

    Attributes:
        chunk: tokens of a chunk.
        counts: for every step, how many sequences have a chunk; descending.
        order: for packed sequences, their indices, longest first; else None.
        index: for packed sequences, the token at every position of a chunk, [chunks, C], T for none; else None.
    """

    chunk: int
    counts: list[int]
    order: Tensor | None = None
    index: Tensor | None = None

    @staticmethod
    def of(batch: int, tokens: int) -> "Layout":
        chunk = _chunk_size(tokens)
        return Layout(chunk, [batch] * math.ceil(tokens / chunk))

    @staticmethod
    def packed(tokens: int, cu_seqlens: Tensor) -> "Layout":
        spans = sequence_slices(cu_seqlens)
        starts = torch.tensor([s.start for s in spans], dtype=torch.long)
        lengths = torch.tensor([s.stop - s.start for s in spans], dtype=torch.long)
        longest = int(lengths.max()) if spans else 0
        chunk = _chunk_size(longest)
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        counts, index = [], [torch.empty(0, chunk, dtype=torch.long)]
        for first in range(0, longest, chunk):
            counts.append(count := int((lengths > first).sum()))
            place = first + torch.arange(chunk)
            index.append(torch.where(place < lengths[:count, None], starts[:count, None] + place, tokens))
        return Layout(chunk, counts, order.to(cu_seqlens.device), torch.cat(index).to(cu_seqlens.device))

    def split(self, x: Tensor, dtype: torch.dtype, factor: Tensor | float = 1.0) -> Tensor:
        """Convert x [B,T,H,D] to rows [R,C,D], times ``factor`` (a number, or rows); zeros where there is no token."""
        if self.index is not None:
            padded = F.pad(x[0].to(dtype), (0, 0, 0, 0, 0, 1))
            return padded[self.index].transpose(1, 2).reshape(-1, self.chunk, x.shape[-1]) * factor
        if x.shape[1] % self.chunk:
            x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.chunk))
        chunks = x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)
        rows = torch.empty(chunks.shape, dtype=dtype, device=x.device)
        if isinstance(factor, Tensor):  # in one pass; a number as factor would compute the product in 16 bits
            torch.mul(chunks, factor.view(*chunks.shape[:-1], -1), out=rows)
        else:
            rows.copy_(chunks)
            if factor != 1:
                rows.mul_(factor)
        return rows.view(-1, self.chunk, x.shape[-1])

    def join(self, rows: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """Write rows [R,C,D] or [R,J*C,D], times ``factor``, to out [B,T,H,D]; zeros to tokens without a row."""
        batch, tokens, heads, dim = out.shape
        if self.index is not None:
            places = rows.new_zeros(tokens + 1, heads, dim)
            places[self.index] = rows.view(-1, heads, self.chunk, dim).transpose(1, 2)
            out[0] = places[:-1].mul_(factor)
            return
        chunks = rows.view(-1, batch, heads, self.chunk, dim).permute(1, 0, 3, 2, 4)
        if tokens % self.chunk:
            out.copy_(chunks.flatten(1, 2)[:, :tokens].mul_(factor))
        elif rows.dtype == out.dtype:
            torch.mul(chunks, factor, out=out.unflatten(1, (-1, self.chunk)))
        else:
            out.unflatten(1, (-1, self.chunk)).copy_(chunks * factor)

    def sort(self, states: Tensor) -> Tensor:
        return states if self.order is None else states[self.order]

    def unsort(self, states: Tensor) -> Tensor:
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


def _chunk_size(tokens: int) -> int:
    return min(CHUNK, max(16, 1 << max(tokens - 1, 0).bit_length()))


def _spans(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    """Return time slices that fit the CPU caches, from shapes alone: one for packed sequences, none for no elements."""
    batch, tokens, heads, dim = q.shape
    if q.numel() == 0 or v.numel() == 0:
        return []
    if cu_seqlens is not None:
        return [slice(0, tokens)]
    row = batch * heads * max(dim, v.shape[-1]) * CHUNK
    step = CHUNK * max(1, SEGMENT // row)
    return [slice(a, min(a + step, tokens)) for a in range(0, tokens, step)]


def _segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, Layout]]:
    """Return the slices of ``_spans`` with their layouts."""
    spans = _spans(q, v, cu_seqlens)
    if cu_seqlens is not None:
        return [(span, Layout.packed(q.shape[1], cu_seqlens)) for span in spans]
    return [(span, Layout.of(q.shape[0], span.stop - span.start)) for span in spans]


# ------------------------------------------------------------------------------------------------------- gates of a row
@dataclass(frozen=True)
class Decay:
    """The decay factors of every row.

    Attributes:
        query, key: factors of queries and keys, [R,C,G]; in hot rows exp b_t and exp(b_C - b_t).
        entry: factor from the state before the chunk to the reference token, [R,G,1]; 1 in hot rows.
        exit: factor from the reference token to the state after the chunk, [R,G,1]; 1 in hot rows.
        total: factor from the state before the chunk to the state after it, [R,G,1].
        hot: the hot rows, None if there are none.
    """

    query: Tensor
    key: Tensor
    entry: Tensor
    exit: Tensor
    total: Tensor
    hot: "Hot | None"

    def query_heads(self, group: int) -> Tensor:
        """Return the queries' factors for each of the ``group`` query heads that share a key head, [R*J,C,G]."""
        return self.query if group == 1 else self.query.repeat_interleave(group, 0)

    @staticmethod
    def of(g: Tensor) -> "Decay":
        sums = _sums_from_middle(g.shape[1], g.dtype, g.device).expand(g.shape[0], -1, -1)
        from_middle = torch.bmm(sums, g)
        if not len(g):
            nothing = g.new_empty(0, 1, 1)
            return Decay(nothing, nothing, nothing, nothing, nothing, None)
        cool = bool(from_middle[:, 0].amax() <= COOL) and bool(from_middle[:, -1].amin() >= -COOL)
        if not cool:  # also for NaN, which comes from infinite gates
            g = g.clamp(min=FLOOR)
            from_middle = torch.bmm(sums, g)
        to_middle = g[:, 0] - from_middle[:, 0]
        entry, total = to_middle.exp(), (to_middle + from_middle[:, -1]).exp()
        hot = None if cool else Hot.of(g, from_middle)
        query = from_middle.exp_()
        key, exit_ = query.reciprocal(), query[:, -1].clone()
        if hot is not None:
            query[hot.rows] = hot.sums.exp().to(g.dtype)
            key[hot.rows] = (hot.sums[:, -1:] - hot.sums).exp().to(g.dtype)
            entry[hot.rows] = 1
            exit_[hot.rows] = 1
        return Decay(query, key, entry[..., None], exit_[..., None], total[..., None], hot)


class Hot(NamedTuple):
    """Indices of the rows whose scores are computed by halves, and their running sums of log-decays, fp64 [.,C,G]."""

    rows: Tensor
    sums: Tensor

    @staticmethod
    def of(g: Tensor, from_middle: Tensor) -> "Hot":
        rows = ((from_middle[:, 0] > COOL) | (from_middle[:, -1] < -COOL)).any(-1).nonzero().squeeze(-1)
        return Hot(rows, g[rows].double().cumsum(1))


@cache
def _sums_from_middle(chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [C,C] of 0, 1 and -1 whose product with a chunk's log-decays is b_t - b_mid.

    It sums outwards from the middle, so that no two large sums are subtracted.
    """
    t, u = torch.arange(chunk, device=device)[:, None], torch.arange(chunk, device=device)
    middle = chunk // 2 - 1
    return ((middle < u) & (u <= t)).to(dtype) - ((t < u) & (u <= middle)).to(dtype)


def _halves(rows: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the left and right halves [R, C/(2 half), half, D] of every block of 2 * half tokens."""
    blocks = rows.unflatten(1, (-1, 2, half))
    return blocks[:, :, 0], blocks[:, :, 1]


def _half_decays(sums: Tensor, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the decay from a left token to the end of its half, and from there to a right token; both are <= 1."""
    left, right = _halves(sums, half)
    reference = left[:, :, -1:]
    return (reference - left).exp().to(dtype), (right - reference).exp().to(dtype)


def _block_view(scores: Tensor, half: int) -> Tensor:
    """Return the view [R, half (right), half (left), blocks] of scores [R,C,C]: pairs across the halves of a block."""
    blocks = scores.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)


def _hot_scores(q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """Compute the scores [R,C,C] of hot rows from q and k [R,C,K] without decay and the running sums [R,C,G]."""
    chunk = q.shape[1]
    scores = q.new_zeros(q.shape[0], chunk, chunk)
    scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    for level in range(chunk.bit_length() - 1):
        half = 1 << level
        to_end, from_end = _half_decays(sums, half, q.dtype)
        left, right = _halves(k, half)[0] * to_end, _halves(q, half)[1] * from_end
        _block_view(scores, half).copy_((right @ left.mT).permute(0, 2, 3, 1))
    return scores


def _hot_scores_backward(dscores: Tensor, q: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k [R,C,K] and of the log-decays [R,C,G] through ``_hot_scores``."""
    diagonal = dscores.diagonal(dim1=1, dim2=2)[..., None]
    dq, dk, dg = diagonal * k, diagonal * q, torch.zeros_like(sums, dtype=q.dtype)
    for level in range(q.shape[1].bit_length() - 1):
        half = 1 << level
        to_end, from_end = _half_decays(sums, half, q.dtype)
        left, right = _halves(k, half)[0] * to_end, _halves(q, half)[1] * from_end
        dblock = _block_view(dscores, half).permute(0, 3, 1, 2)
        dright, dleft = dblock @ left, dblock.mT @ right
        _halves(dq, half)[1].add_(dright * from_end)
        _halves(dk, half)[0].add_(dleft * to_end)
        _halves(dg, half)[1].add_(_later(_per_gate(right * dright, sums)))
        _halves(dg, half)[0].add_(_earlier(_per_gate(left * dleft, sums)))
    return dq, dk, dg


def _per_gate(x: Tensor, gates: Tensor) -> Tensor:
    """Reduce x [..,K] to [..,G]: the gradient of a gate per head is the sum over channels."""
    return x if gates.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


def _later(x: Tensor) -> Tensor:
    """Sum over tokens t >= u, for every u, along the second-to-last dimension."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _earlier(x: Tensor) -> Tensor:
    """Sum over tokens t < u, for every u, along the second-to-last dimension, without a subtraction."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


# ----------------------------------------------------------------------------------------------------- states of chunks
def _scan(update: Tensor, total: Tensor | None, state: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the states before every chunk [R,K,V] and after the last one [N,H,K,V].

    Args:
        update: what every chunk adds to the state, [R,K,V].
        total: decay of every chunk, [R,G,1], or None.
        state: initial states [N,H,K,V].
        counts: as in ``Layout``.
    """
    before, heads = torch.empty_like(update), state.shape[1]
    last = _run(update, total, state.flatten(0, 1).clone(), before, [n * heads for n in counts], backwards=False)
    return before, last.unflatten(0, (-1, heads))


def _scan_backward(update: Tensor, total: Tensor | None, dstate: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the state after every chunk [R,K,V] and of the initial state [N,H,K,V]."""
    after, heads = torch.empty_like(update), dstate.shape[1]
    first = _run(update, total, dstate.flatten(0, 1).clone(), after, [n * heads for n in counts], backwards=True)
    return after, first.unflatten(0, (-1, heads))


def _run(update, total, state: Tensor, kept: Tensor, sizes: list[int], backwards: bool) -> Tensor:
    """At every step, copy the state to ``kept`` and update it in place to ``total * state + update``; return it."""
    steps = list(
        zip(kept.split(sizes), update.split(sizes), sizes if total is None else total.split(sizes), strict=True)
    )
    for place, new, decay in reversed(steps) if backwards else steps:
        running = state if len(place) == len(state) else state[: len(place)]
        place.copy_(running)
        if isinstance(decay, Tensor):
            torch.addcmul(new, place, decay, out=running)
        else:
            running.add_(new)
    return state


# ------------------------------------------------------------------------------------------------- forward and backward
class _Rows:
    """Operands, decays, scores and states of one segment, which forward and backward share.

    A row is a chunk of a key head. The J query heads that share the key head are concatenated, [R,J*C,K], so that one
    product computes all of them.
    """

    def __init__(self, q, k, v, g, taylor, state, layout, dtype):
        self.group = group = q.shape[2] // k.shape[2]
        self.decay = decay = None if g is None else Decay.of(layout.split(g, dtype))
        self.total = None if decay is None else decay.total
        self.hot = None if decay is None else decay.hot
        self.raw = None
        self.root = 1.0 if taylor is None else taylor**0.5
        if taylor is not None:  # a position without a token also has the feature 1, but its value is zero
            self.raw = layout.split(q, dtype, self.root), layout.split(k, dtype, self.root)
            self.q, self.k = _stack(features.taylor(self.raw[0]), group), features.taylor(self.raw[1])
        else:
            self.q = _stack(layout.split(q, dtype, 1.0 if decay is None else decay.query_heads(group)), group)
            self.k = layout.split(k, dtype, 1.0 if decay is None else decay.key)
        if self.hot is not None:
            self.hot_q = _each(_stack(layout.split(q, dtype), group)[self.hot.rows], group)
            self.hot_k = layout.split(k, dtype)[self.hot.rows]
        self.v = layout.split(v, dtype)
        self.scores = self.causal(torch.bmm(self.q, self.k.mT))
        if self.hot is not None:
            hot = _hot_scores(self.hot_q.flatten(0, 1), *self._hot_keys(self.hot))
            self.scores[self.hot.rows] = hot.view(len(self.hot.rows), group * hot.shape[1], hot.shape[2])
        self.update = torch.bmm(self.k.mT, self.v)
        if decay is not None:
            self.update *= decay.exit
        self.before, self.state = _scan(self.update, self.total, state, layout.counts)

    def causal(self, scores: Tensor) -> Tensor:
        """Set the scores [R,J*C,C] to zero, in place, where the key is later than the query."""
        _each(scores, self.group).tril_()
        return scores

    def _hot_keys(self, hot: Hot) -> tuple[Tensor, Tensor]:
        """Return the keys and running sums of the hot rows, repeated for every query head."""
        return self.hot_k.repeat_interleave(self.group, 0), hot.sums.repeat_interleave(self.group, 0)

    def hot_backward(self, hot: Hot, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of the hot rows' q [n,J,C,K], k [n,C,K] and log-decays [n,C,G] from their scores'."""
        k, sums = self._hot_keys(hot)
        dq, dk, dg = _hot_scores_backward(_each(dscores, self.group).flatten(0, 1), self.hot_q.flatten(0, 1), k, sums)
        dq, dk, dg = (x.unflatten(0, (-1, self.group)) for x in (dq, dk, dg))
        return dq, dk.sum(1), dg.sum(1)


def _stack(rows: Tensor, group: int) -> Tensor:
    """View rows [R*J,C,D] of query heads as [R,J*C,D]."""
    return rows.view(rows.shape[0] // group, group * rows.shape[1], rows.shape[2])


def _each(rows: Tensor, group: int) -> Tensor:
    """View rows [R,J*C,D] as [R,J,C,D]."""
    return rows.view(rows.shape[0], group, rows.shape[1] // group, rows.shape[2])


@opaque_op("hybridattn::linear_attention_chunked")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs and states.

    Args:
        q: [B,T,J*H,K].
        k: [B,T,H,K].
        v: [B,T,H,V].
        g: [B,T,H,K], [B,T,H,1] or None.
        scale: factor of the outputs.
        taylor: if given, the scores are 1 + z + z^2 / 2 with z = taylor * q.k; g is None, and the states have P rows,
            one per packed feature, instead of K.
        state: [N,H,K,V].
        cu_seqlens: [N+1] or None.

    Returns:
        o [B,T,J*H,V] in v's dtype, final states [N,H,K,V], and the states before every segment [S,N,H,K,V].
    """
    dtype = compute_dtype(q, k, v, g)
    starts = state.new_empty(len(_spans(q, v, cu_seqlens)), *state.shape)
    o, state = v.new_empty(*q.shape[:3], v.shape[3]), state.clone()
    if not len(starts):
        o.zero_()
    for n, (t, layout) in enumerate(_segments(q, v, cu_seqlens)):
        starts[n] = state
        gt = None if g is None else g[:, t]
        r = _Rows(q[:, t], k[:, t], v[:, t], gt, taylor, layout.sort(state), layout, dtype)
        entering = r.before if r.decay is None else r.before.mul_(r.decay.entry)
        layout.join(torch.bmm(r.scores, r.v).baddbmm_(r.q, entering), o[:, t], scale)
        state = layout.unsort(r.state)
    return o, state, starts


@forward.register_fake
def _(q, k, v, g, scale, taylor, state, cu_seqlens):
    starts = state.new_empty(len(_spans(q, v, cu_seqlens)), *state.shape)
    return v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(state), starts


@opaque_op("hybridattn::linear_attention_chunked_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without gates) and the initial state.

    Args:
        q, k, v, g, scale, taylor, cu_seqlens: as in ``forward``.
        starts: states before every segment, from ``forward``.
        do: gradient of the outputs.
        dstate: gradient of the final states.
    """
    dtype, dstate = compute_dtype(q, k, v, g), dstate.clone()
    gates = q.new_empty(0) if g is None else g
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gates)]
    with no_autocast(q):
        for (t, layout), start in reversed(list(zip(_segments(q, v, cu_seqlens), starts, strict=True))):
            gt = None if g is None else g[:, t]
            r = _Rows(q[:, t], k[:, t], v[:, t], gt, taylor, layout.sort(start), layout, dtype)
            do_rows = _stack(layout.split(do[:, t], dtype, scale), r.group)
            dq, dk, dv, dg, dstate = _backward_rows(r, do_rows, layout.sort(dstate), layout.counts)
            if r.raw is not None:
                pairs = zip(r.raw, (dq, dk), strict=True)
                dq, dk = (
                    features.taylor_backward(x, dx.view(*x.shape[:2], dx.shape[-1])).mul_(r.root) for x, dx in pairs
                )
            for grad, rows in zip(grads, (dq, dk, dv, dg), strict=True):
                if rows is not None:
                    layout.join(rows, grad[:, t])
            dstate = layout.unsort(dstate)
    return grads[0], grads[1], grads[2], grads[3], dstate


@backward.register_fake
def _(q, k, v, g, scale, taylor, starts, cu_seqlens, do, dstate):
    gates = q.new_empty(0) if g is None else g
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gates)]
    return grads[0], grads[1], grads[2], grads[3], torch.empty_like(dstate)


def _backward_rows(
    r: _Rows, do: Tensor, dstate: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Compute the gradients of the rows of q, k, v and g (None without gates), and of the states before the segment."""
    dentry = torch.bmm(r.q.mT, do)
    if r.decay is not None:
        dentry *= r.decay.entry
    after, dstate = _scan_backward(dentry, r.total, dstate, counts)
    dscores = r.causal(torch.bmm(do, r.v.mT))
    if r.hot is not None:
        dscores_hot = dscores[r.hot.rows]
        dscores[r.hot.rows] = 0
    entering, leaving = (r.before, after) if r.decay is None else (r.before * r.decay.entry, after * r.decay.exit)
    dv = torch.bmm(r.scores.mT, do).baddbmm_(r.k, leaving)
    dq = torch.bmm(dscores, r.k).baddbmm_(do, entering.mT)
    dk = torch.bmm(dscores.mT, r.q).baddbmm_(r.v, leaving.mT)
    if r.decay is None:
        return dq, dk, dv, None, dstate
    gates = r.decay.total[..., 0]
    dtotal = _per_gate((r.decay.total * r.before * after).sum(-1), gates)[:, None]
    dg = dtotal + _cool_dg(
        _per_gate(_each(dq * r.q, r.group).sum(1).sub_(dk * r.k), gates),
        _per_gate((r.before * dentry).sum(-1), gates)[:, None],
        _per_gate((r.update * after).sum(-1), gates)[:, None],
    )
    _each(dq, r.group).mul_(r.decay.query[:, None])
    dk.mul_(r.decay.key)
    if r.hot is not None:
        rows = r.hot.rows
        dq_hot, dk_hot, dg_hot = r.hot_backward(r.hot, dscores_hot)
        dq_far, dk_far = _each(dq[rows], r.group), dk[rows]  # through the states only: dscores of hot rows was set to 0
        dg_hot += dtotal[rows] + _later(_per_gate((dq_far * r.hot_q).sum(1), gates))
        dg[rows] = dg_hot + _earlier(_per_gate(dk_far * r.hot_k, gates))
        dq[rows] = (dq_far + dq_hot).flatten(1, 2)
        dk[rows] = dk_far + dk_hot
    return dq, dk, dv, dg, dstate


def _cool_dg(dexponent: Tensor, dentry: Tensor, dexit: Tensor) -> Tensor:
    """Compute the gradient of the log-decays [R,C,G] of cool rows.

    Args:
        dexponent: gradient of the exponents b_t - b_mid, [R,C,G].
        dentry, dexit: gradients of the exponents b_mid and b_C - b_mid, [R,1,G].

    A gate up to the middle enters the exponents of earlier tokens with a minus sign. A gate after the middle enters
    the exponents of its own and later tokens.
    """
    halves = dexponent.unflatten(1, (2, -1))
    sums = halves.cumsum(2)
    first = dentry - (sums[:, 0] - halves[:, 0])
    second = dexit + sums[:, 1, -1:] - (sums[:, 1] - halves[:, 1])
    return torch.cat((first, second), 1)


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, ctx.taylor, _, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, output[2], cu_seqlens)


def _backward(ctx, do, dstate, _dstarts):
    q, k, v, g, starts, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dstate = starts.new_zeros(starts.shape[1:]) if dstate is None else dstate
    dq, dk, dv, dg, dstate = backward(q, k, v, g, ctx.scale, ctx.taylor, starts, cu_seqlens, do, dstate)
    return dq, dk, dv, None if g is None else dg, None, None, dstate, None


forward.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute outputs [B,T,J*H,V] in v's dtype and final states [N,H,K,V]; differentiable once.

    The arguments are those of ``forward``.
    """
    o, state, _ = forward(q, k, v, g, scale, taylor, state, cu_seqlens)
    return o, state
