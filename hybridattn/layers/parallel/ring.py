"""Full softmax attention with keys and values that go round the ranks."""

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
    """Causal softmax attention of this rank's queries [B,T,Hq,D] with the keys [B,T,H,D] of all ranks.

    Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023), section 3. Parts are
    merged by their log-sum-exp in fp32. In memory are this rank's keys, those it computes with and those that arrive;
    in the backward pass they go round again with their gradients, each part being computed anew.

    Args:
        sinks: [Hq] or None.
        options: further ones of ``flash_attention``, none of which depends on positions.
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
        """Each part again, now with gradients. It has the weight w = exp(lse_part - lse) in o: the gradient of its
        output is w do, and that of its lse w do . (o_part - o)."""
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
    """The share of a part in the whole, [B,T,H,1]; none where nothing is seen."""
    return (lse - total).exp().masked_fill(total == float("-inf"), 0.0)[..., None]


def _own(
    shards: Shards, options: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and lse of this rank's pieces, each with its own keys and the sinks."""
    q, k, v = (shards.pack(x) for x in (q, k, v))
    o, lse = flash_attention(q, k, v, cu_seqlens_q=shards.offsets, sinks=sinks, return_lse=True, **options)
    return shards.unpack(o), shards.unpack(lse)


def _part(options: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of queries that see all of these keys."""
    return flash_attention(q, k, v, causal=False, return_lse=True, **options)


def _visible(shards: Shards, rank: int) -> list[tuple[slice, slice]]:
    """Which of this rank's tokens see which of ``rank``'s: first pieces the earlier part of their sequence."""
    context, found = shards.context, []
    for mine, here in context.places(context.rank):
        begin = shards.begins(mine)
        for theirs, there in context.places(rank):
            first = max(begin, theirs.start)
            if first < theirs.stop <= mine.start:
                keys = slice(there + first - theirs.start, there + theirs.stop - theirs.start)
                found.append((slice(here, here + shards.first_piece(mine)), keys))
    return found


def _visits(shards: Shards, both: Tensor, grads: Tensor | None) -> Iterator[tuple[int, Tensor, Any]]:
    """(rank, its keys and values [2,B,T,H,D], their gradients), this rank first, then each as it comes round.

    Gradients, if any, are added to by the caller and travel with their keys; at the end what other ranks have found is
    added to this rank's ``grads``.
    """
    context = shards.context
    size, rank = context.size, context.rank
    home = grads
    for step in range(size):
        visitor, following = (rank - step) % size, (rank - step - 1) % size
        if step + 1 < size:  # the next ones arrive meanwhile
            arriving, works = _pass(context, both, following)
        yield visitor, both, grads
        if home is not None and grads is not None:
            if step == 0:
                grads = _empty(home, context, following).zero_()
            else:
                # After the last step they are one place before their home.
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
    """Send x to the next rank, and take from the one before what it has, which is ``following``'s."""
    x, received = x.contiguous(), _empty(x, context, following)
    group = context.group
    to, by = (dist.get_global_rank(group, (context.rank + d) % context.size) for d in (1, -1))
    operations = [dist.P2POp(dist.isend, x, to, group)] if x.numel() else []
    operations += [dist.P2POp(dist.irecv, received, by, group)] if received.numel() else []
    context.traffic["ring"] += x.nbytes
    return received, [(work, x) for work in dist.batch_isend_irecv(operations)] if operations else []


def _wait(works: list[Any]) -> None:
    for work, _ in works:  # with it what is being sent, which must not go before it is
        work.wait()
