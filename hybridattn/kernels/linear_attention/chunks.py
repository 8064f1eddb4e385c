"""Chunks of sequences, the decays within them and the states between them: what the torch backends share.

Dimensions: R rows (one chunk of one head of one sequence each), C tokens of a chunk, K key dim, V value dim, G gates
per head (K for gates per channel, 1 for gates per head). See ``chunked`` for the formulas.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.sequences import sequence_slices

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

    def split(self, x: Tensor, dtype: torch.dtype, factor: Tensor | float = 1.0, share: int = 1) -> Tensor:
        """Convert x [B,T,H,D] to rows [R,C,D], times ``factor`` (a number, or rows); zeros where there is no token.

        With ``share`` each head becomes so many rows, for the value heads that share it.
        """
        if self.index is not None:
            padded = F.pad(x[0].to(dtype), (0, 0, 0, 0, 0, 1))
            chunks = padded[self.index].transpose(1, 2)
        else:
            if x.shape[1] % self.chunk:
                x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.chunk))
            chunks = x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)
        if share > 1:
            chunks = chunks.unsqueeze(-3).expand(*chunks.shape[:-2], share, *chunks.shape[-2:])
        rows = torch.empty(chunks.shape, dtype=dtype, device=x.device)
        if isinstance(factor, Tensor):  # in one pass; a number as factor would compute the product in 16 bits
            torch.mul(chunks, factor.unflatten(0, chunks.shape[:-2]), out=rows)
        else:
            rows.copy_(chunks)
            if factor != 1:
                rows.mul_(factor)
        return rows.flatten(0, -3)

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


def time_spans(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    """Return time slices that fit the CPU caches, from shapes alone: one for packed sequences, none for no elements."""
    batch, tokens, dim = q.shape[0], q.shape[1], q.shape[3]
    if q.numel() == 0 or v.numel() == 0:
        return []
    if cu_seqlens is not None:
        return [slice(0, tokens)]
    row = batch * max(q.shape[2], v.shape[2]) * max(dim, v.shape[-1]) * CHUNK
    step = CHUNK * max(1, SEGMENT // row)
    return [slice(a, min(a + step, tokens)) for a in range(0, tokens, step)]


def time_segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, Layout]]:
    """Return the slices of ``time_spans`` with their layouts."""
    spans = time_spans(q, v, cu_seqlens)
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


def hot_scores(q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
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


def hot_scores_backward(dscores: Tensor, q: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k [R,C,K] and of the log-decays [R,C,G] through ``hot_scores``."""
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
        _halves(dg, half)[1].add_(later(per_gate(right * dright, sums)))
        _halves(dg, half)[0].add_(earlier(per_gate(left * dleft, sums)))
    return dq, dk, dg


def per_gate(x: Tensor, gates: Tensor) -> Tensor:
    """Reduce x [..,K] to [..,G]: the gradient of a gate per head is the sum over channels."""
    return x if gates.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


def later(x: Tensor) -> Tensor:
    """Sum over tokens t >= u, for every u, along the second-to-last dimension."""
    return x.flip(-2).cumsum(-2).flip(-2)


def earlier(x: Tensor) -> Tensor:
    """Sum over tokens t < u, for every u, along the second-to-last dimension, without a subtraction."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


# ----------------------------------------------------------------------------------------------------- states of chunks
def scan(update: Tensor, total: Tensor | None, state: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
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


def scan_backward(update: Tensor, total: Tensor | None, dstate: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
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
