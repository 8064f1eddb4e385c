"""Differentiable communication between ranks: all-gather, all-to-all, sum, and access to tokens of other ranks."""

from bisect import bisect_left, bisect_right
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .context import SequenceParallel, current

Range = tuple[int, int]  # start and stop in the whole sequence, in tokens

# torch 2.13 renamed these functions.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AllGather(torch.autograd.Function):
    """Concatenate [S,..] of all n ranks to [n S,..]; the backward pass sums and scatters the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceParallel, kind: str) -> Tensor:
        ctx.context, ctx.kind = context, kind
        context.traffic[kind] += (context.size - 1) * x.nbytes
        gathered = x.new_empty(context.size * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=context.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), context = grads, ctx.context
        own = grad.new_empty(grad.shape[0] // context.size, *grad.shape[1:])
        context.traffic[ctx.kind] += (context.size - 1) * own.nbytes
        _reduce_scatter(own, grad.contiguous(), group=context.group)
        return own, None, None


class AllToAll(torch.autograd.Function):
    """Send ``sends[r]`` rows to each rank r and receive ``receives[r]``: [sum(sends),..] -> [sum(receives),..]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], context: Any, kind: str) -> Tensor:
        ctx.sends, ctx.receives, ctx.context, ctx.kind = sends, receives, context, kind
        return _all_to_all(x, sends, receives, context, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = _all_to_all(grads[0], ctx.receives, ctx.sends, ctx.context, ctx.kind)
        return back, None, None, None, None


def _all_to_all(x: Tensor, sends: list[int], receives: list[int], context: SequenceParallel, kind: str) -> Tensor:
    received = x.new_empty(sum(receives), *x.shape[1:])
    row = x[:1].nbytes if len(x) else 0
    context.traffic[kind] += row * (sum(sends) - sends[context.rank])
    dist.all_to_all_single(received, x.contiguous(), receives, sends, group=context.group)
    return received


class Sum(torch.autograd.Function):
    """Sum over the ranks; the gradient of each rank's term is the gradient of the sum on that rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: SequenceParallel) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=context.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fetch(context: SequenceParallel, x: Tensor, wanted: list[list[Range]], kind: str) -> list[Tensor]:
    """Return ranges of tokens of the whole sequence, from whichever ranks hold them.

    Args:
        context: the active context.
        x: this rank's tokens, [B,T,..].
        wanted: for every rank, the ranges of tokens that it requests. All ranks pass the same list.
        kind: key of ``traffic`` for the bytes sent.

    Returns:
        For each range of this rank, its tokens [B,n,..].
    """
    pieces = [_pieces(context, ranges) for ranges in wanted]
    here = dict(context.places(context.rank))
    sent = [x[:, :0]]
    for ranges in pieces:
        for segment, _, a, b in ranges:
            if segment.owner == context.rank:
                sent.append(x[:, here[segment] + a - segment.start : here[segment] + b - segment.start])
    rows = torch.cat(sent, 1).transpose(0, 1)
    if any(segment.owner != rank for rank, ranges in enumerate(pieces) for segment, *_ in ranges):
        sends = [sum(b - a for s, _, a, b in ranges if s.owner == context.rank) for ranges in pieces]
        receives = [
            sum(b - a for s, _, a, b in pieces[context.rank] if s.owner == rank) for rank in range(context.size)
        ]
        rows = AllToAll.apply(rows, sends, receives, context, kind)
    else:  # all ranks hold their own ranges, and all of them know it: none communicates
        own = sum(b - a for _, _, a, b in pieces[context.rank])
        before = sum(b - a for ranges in pieces[: context.rank] for s, _, a, b in ranges if s.owner == context.rank)
        rows = rows[before : before + own]
    rows = rows.transpose(0, 1)  # pyright: ignore[reportOptionalMemberAccess]
    # The rows arrive sorted by rank; the ranges need them sorted by segment.
    arrived = sorted(pieces[context.rank], key=lambda piece: piece[0].owner)
    parts = dict(zip(((p[1], p[0]) for p in arrived), rows.split([b - a for *_, a, b in arrived], 1), strict=True))
    return [
        torch.cat([rows[:, :0], *(parts[number, s] for s in context.segments if (number, s) in parts)], 1)
        for number in range(len(wanted[context.rank]))
    ]


def _pieces(context: SequenceParallel, ranges: list[Range]) -> list[tuple[Any, int, int, int]]:
    """Cut ranges at the segments' borders: (segment, index of the range, first token, last token + 1)."""
    return [
        (segment, number, max(a, segment.start), min(b, segment.stop))
        for number, (a, b) in enumerate(ranges)
        for segment in context.segments[bisect_right(context.ends, a) : bisect_left(context.ends, b) + 1]
        if max(a, segment.start) < min(b, segment.stop)
    ]


def _active() -> SequenceParallel:
    context = current()
    if context is None:
        raise ValueError("sequence_parallel: expected an active context, got none")
    return context


def shard_sequence(x: Tensor, dim: int = 1) -> Tensor:
    """Return this rank's tokens of ``x``, which every rank passes whole; differentiable.

    Args:
        x: the whole sequence, with its T tokens in dimension ``dim``.
        dim: the time dimension.

    Raises:
        ValueError: no ``sequence_parallel`` context is active, or ``dim`` does not have its T tokens.
    """
    context = _active()
    if x.dim() <= dim or x.shape[dim] != context.tokens:
        raise ValueError(f"x: expected {context.tokens} tokens in dimension {dim}, got {list(x.shape)}")
    return torch.cat([x.narrow(dim, s.start, s.stop - s.start) for s in context.own], dim)


def gather_sequence(x: Tensor, dim: int = 1) -> Tensor:
    """Return the whole sequence on every rank; differentiable, and the gradients of all ranks are summed.

    Args:
        x: this rank's tokens, in dimension ``dim``.
        dim: the time dimension.

    Raises:
        ValueError: no ``sequence_parallel`` context is active, or ``dim`` does not have this rank's tokens.
    """
    context = _active()
    context.check("x", x, dim)
    (whole,) = fetch(context, x.movedim(dim, 0)[None], [[(0, context.tokens)]] * context.size, "gather")
    return whole[0].movedim(0, dim)


def next_labels(labels: Tensor) -> Tensor:
    """Return the label after each of this rank's tokens [B,T], also if another rank holds it; -100 at the end."""
    context = _active()
    context.check("labels", labels)
    wanted = [
        [(s.stop, s.stop + 1) if s.stop > s.start else (0, 0) for s in context.of(r)] for r in range(context.size)
    ]
    following = fetch(context, labels, wanted, "labels")
    parts = []
    for (segment, at), after in zip(context.places(context.rank), following, strict=True):
        after = torch.cat((after, after.new_full((len(after), 1), -100)), 1)[
            :, :1
        ]  # the whole sequence's last token has no successor
        parts.append(torch.cat((labels[:, at : at + segment.stop - segment.start], after), 1)[:, 1:])
    return torch.cat(parts, 1)
