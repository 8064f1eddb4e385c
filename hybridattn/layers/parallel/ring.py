"""Ring attention: full softmax attention over several ranks, which pass their keys and values around."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.flash_attention import flash_attention
from ...kernels.runtime.backend import autocast, compute_dtype
from .context import SequenceParallel
from .shards import Shards


def ring_attention(
    shards: Shards, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Compute causal softmax attention of this rank's queries with the keys and values of all ranks.

    Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023), section 3. The outputs
    for each rank's keys are merged by their log-sum-exp, in fp32 or fp64. A rank holds its own keys and values, those
    it computes with and those that arrive. The backward pass sends them around again with their gradients, and
    recomputes the outputs.

    Args:
        shards: this rank's pieces.
        q: queries [B,T,Hq,D] of this rank.
        k, v: keys and values [B,T,H,D] of this rank.
        sinks: [Hq] or None.
        options: further arguments of ``flash_attention``, none of which may depend on positions.

    Returns:
        [B,T,Hq,D].
    """
    q, k, v = autocast(q, k, v)
    return Ring.apply(q, k, v, sinks, shards, options)  # pyright: ignore[reportReturnType]


class Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, shards: Shards, options: Any
    ) -> Tensor:
        dtype = compute_dtype(q, k, v)
        o, lse = _own(shards, options, q, k, v, sinks)
        o = o.to(dtype)
        for rank, both, _ in _visits(shards, torch.stack((k, v)), None):
            for queries, keys in _visible(shards, rank):
                o_part, lse_part = _part(options, q[:, queries], *both[:, :, keys])
                total = torch.logaddexp(lse[:, queries], lse_part)
                o[:, queries] *= _weight(lse[:, queries], total)
                o[:, queries] += _weight(lse_part, total) * o_part.to(dtype)
                lse[:, queries] = total
        o = o.to(v.dtype)
        ctx.save_for_backward(q, k, v, sinks, o, lse)
        ctx.shards, ctx.options = shards, options
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Recompute the output for each rank's keys, and its gradients.

        o is the sum of the outputs o_part, weighted by w = exp(lse_part - lse). So the gradient of o_part is w do, and
        that of lse_part is w do . (o_part - o).
        """
        (grad,), (q, k, v, sinks, o, lse) = grads, ctx.saved_tensors
        shards, options, dtype = ctx.shards, ctx.options, lse.dtype

        def part_grads(queries: slice, attend: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                inputs = tuple(x.detach().requires_grad_() for x in inputs)
                o_part, lse_part = attend(*inputs)
            weight = _weight(lse_part.detach(), lse[:, queries])
            d_o = weight * grad[:, queries].to(dtype)
            d_lse = (d_o * (o_part.detach().to(dtype) - o[:, queries].to(dtype))).sum(-1)
            return torch.autograd.grad((o_part, lse_part), inputs, (d_o.to(o_part.dtype), d_lse))

        given = (q, k, v) if sinks is None else (q, k, v, sinks)
        dq, dk, dv, *d_sinks = part_grads(slice(0, q.shape[1]), lambda *x: _own(shards, options, *x), *given)
        dq, own = dq.to(dtype), torch.stack((dk, dv)).to(dtype)
        for rank, both, d_both in _visits(shards, torch.stack((k, v)), own):
            for queries, keys in _visible(shards, rank):
                parts = part_grads(queries, lambda *x: _part(options, *x), q[:, queries], *both[:, :, keys])
                for total, part in zip((dq[:, queries], *d_both[:, :, keys]), parts, strict=True):
                    total += part
        dk, dv = own
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), (d_sinks or [None])[0], None, None


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """Return the weight exp(lse - total) [B,T,H,1] of a partial output; 0 for queries without visible keys."""
    return (lse - total).exp().masked_fill(total == float("-inf"), 0.0)[..., None]


def _own(
    shards: Shards, options: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of this rank's pieces, each with its own keys and the sinks."""
    q, k, v = (shards.pack(x) for x in (q, k, v))
    o, lse = flash_attention(q, k, v, cu_seqlens_q=shards.offsets, sinks=sinks, return_lse=True, **options)
    return shards.unpack(o), shards.unpack(lse)


def _part(options: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of queries that attend to all of these keys."""
    return flash_attention(q, k, v, causal=False, return_lse=True, **options)


def _visible(shards: Shards, rank: int) -> list[tuple[slice, slice]]:
    """Return (queries of this rank, keys of ``rank`` that they attend to), as slices of each rank's tokens.

    Only the first piece of a segment continues a sequence of earlier segments, so only its queries have such keys.
    """
    context, found = shards.context, []
    for mine, here in context.places(context.rank):
        begin = shards.sequence_start(mine)
        for theirs, there in context.places(rank):
            first = max(begin, theirs.start)
            if first < theirs.stop <= mine.start:
                keys = slice(there + first - theirs.start, there + theirs.stop - theirs.start)
                found.append((slice(here, here + shards.first_piece(mine)), keys))
    return found


def _visits(shards: Shards, both: Tensor, grads: Tensor | None) -> Iterator[tuple[int, Tensor, Any]]:
    """Yield (rank, its keys and values [2,B,T,H,D], their gradients), first for this rank, then for each earlier one.

    The caller adds to the gradients, if there are any. They are passed on with their keys and values. At the end, the
    generator adds the gradients that other ranks computed to this rank's ``grads``.
    """
    context = shards.context
    size, rank = context.size, context.rank
    home = grads
    for step in range(size):
        visitor, following = (rank - step) % size, (rank - step - 1) % size
        if step + 1 < size:  # the next keys arrive while the caller computes
            arriving, works = _pass(context, both, following)
        yield visitor, both, grads
        if home is not None and grads is not None:
            if step == 0:
                grads = _empty(home, context, following).zero_()
            else:  # the last pass returns the gradients to the rank of their keys
                grads, sent = _pass(context, grads, following)
                _wait(sent)
        if step + 1 < size:
            _wait(works)
            both = arriving
    if home is not None and grads is not None and size > 1:
        home += grads


def _empty(like: Tensor, context: SequenceParallel, rank: int) -> Tensor:
    return like.new_empty(*like.shape[:2], context.count(rank), *like.shape[3:])


def _pass(context: SequenceParallel, x: Tensor, following: int) -> tuple[Tensor, list[Any]]:
    """Start to send x to the next rank and to receive ``following``'s tensor from the previous rank."""
    x, received = x.contiguous(), _empty(x, context, following)
    group = context.group
    to, by = (dist.get_global_rank(group, (context.rank + d) % context.size) for d in (1, -1))
    operations = [dist.P2POp(dist.isend, x, to, group)] if x.numel() else []
    operations += [dist.P2POp(dist.irecv, received, by, group)] if received.numel() else []
    context.traffic["ring"] += x.nbytes
    return received, [(work, x) for work in dist.batch_isend_irecv(operations)] if operations else []


def _wait(works: list[Any]) -> None:
    for work, _ in works:  # each entry also holds the sent tensor, which must stay in memory until then
        work.wait()
