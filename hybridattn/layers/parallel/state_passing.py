"""Initial states of linear attention on each rank: one all-gather forward, one reduce-scatter backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.linear_attention import SegmentState, linear_attention_state, merge_states
from .exchange import AllGather
from .shards import Shards

TOKENS_AT_ONCE = 4096  # per call that sums a state; larger parts gain little speed and need memory for each token


def initial_states(
    shards: Shards,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    keys: Callable[[Tensor], Tensor] | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the initial states of this rank's pieces, and the state after the whole sequence.

    If a sequence begins in a segment, the segment's decay is 0 and its state is that of its last sequence. So the
    number of bytes sent depends neither on the number of tokens nor on the number of sequences.

    Args:
        shards: this rank's pieces.
        k: [B,T,H,K], of this rank.
        v: [B,T,H,V], of this rank.
        g: natural-log decay, [B,T,H,K], [B,T,H] or [H]; None for no decay.
        keys: function from k to the keys of the state, such as a feature map; None for k itself.
        beta: strength of writing of the delta rule, [B,T,H]; None for linear attention.

    Returns:
        The initial states [N,H,K,V] and the final state [B,H,K,V], in fp32 or fp64.
    """
    context = shards.context
    sent, shape, decays = [], torch.Size(), torch.Size()
    for segment, at in context.places(context.rank):
        part = slice(at + shards.state_start(segment) - segment.start, at + segment.stop - segment.start)
        state, decay = _state(k[:, part], v[:, part], _part(g, part), _part(beta, part), keys)
        shape, decays = state.shape[-2:], decay.shape[2:]
        sent.append(torch.cat((state.flatten(2), decay.flatten(2) * (not shards.has_start(segment))), -1))
    gathered = AllGather.apply(torch.stack(sent), context, "states")
    owners = [segment.owner for segment in context.segments]
    arrived = sorted(range(len(owners)), key=owners.__getitem__)  # the gathered rows are sorted by rank
    parts = dict(zip(arrived, gathered, strict=True))  # pyright: ignore[reportArgumentType]
    running, before = None, []
    for number in range(len(owners)):
        state, decay = parts[number].tensor_split([shape.numel()], -1)
        part = SegmentState(state.unflatten(-1, shape), decay.unflatten(-1, decays))
        before.append(torch.zeros_like(part.state) if running is None else running.state)
        running = part if running is None else merge_states(running, part)
    # One tensor of all states: so every rank's result depends on the all-gather, and all ranks join its backward pass.
    own = [number for number, owner in enumerate(owners) if owner == context.rank]
    assert running is not None
    return shards.to_pieces(torch.stack(before)[own]), running.state


def _part(x: Tensor | None, part: slice) -> Tensor | None:
    """Return some tokens of x [B,T,..]; None and constants per head [H] as they are."""
    return x if x is None or x.dim() == 1 else x[:, part]


def _state(
    k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, keys: Callable[[Tensor], Tensor] | None
) -> SegmentState:
    """Compute ``linear_attention_state`` in parts, which the backward pass recomputes to save memory."""

    def of_part(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> SegmentState:
        return linear_attention_state(k if keys is None else keys(k), v, g, beta=beta)

    total = None
    for at in range(0, max(k.shape[1], 1), TOKENS_AT_ONCE):
        part = slice(at, at + TOKENS_AT_ONCE)
        state: SegmentState = checkpoint(  # pyright: ignore[reportAssignmentType]
            of_part, *(_part(x, part) for x in (k, v, g, beta)), use_reentrant=False, preserve_rng_state=False
        )
        total = state if total is None else merge_states(total, state)
    assert total is not None
    return total
