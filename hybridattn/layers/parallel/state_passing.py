"""States of linear attention, passed from segment to segment: one all-gather forward, one reduce-scatter backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.linear_attention import SegmentState, linear_attention_state, merge_states
from .exchange import AllGather
from .shards import Shards

TOKENS_AT_ONCE = 4096  # of a state's sum: more would be faster by little, and need memory for each token


def initial_states(
    shards: Shards, k: Tensor, v: Tensor, g: Tensor | None = None, keys: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The states that this rank's pieces start from, and the one behind the last token.

    A segment in which a sequence begins lets nothing of earlier ones through: its decay is 0, and its state that of its
    last sequence. So what is sent depends neither on the number of tokens nor on that of sequences.

    Args:
        k: [B,T,H,K], of this rank.
        v: [B,T,H,V].
        g: natural-log decay, [B,T,H,K], [B,T,H] or [H]; none by default.
        keys: what stands for k in the state, such as its features; k itself by default.

    Returns:
        fp32 or wider, [N,H,K,V] for every piece, and [B,H,K,V].
    """
    context = shards.context
    sent, shape = [], torch.Size()
    for segment, at in context.places(context.rank):
        part = slice(at + shards.leaves(segment) - segment.start, at + segment.stop - segment.start)
        gates = g if g is None or g.dim() == 1 else g[:, part]
        state, decay = _state(k[:, part], v[:, part], gates, keys)
        shape = state.shape[-2:]
        sent.append(torch.cat((state.flatten(2), decay * (not shards.resets(segment))), -1))
    gathered = AllGather.apply(torch.stack(sent), context, "states")
    owners = [segment.owner for segment in context.segments]
    arrived = sorted(range(len(owners)), key=owners.__getitem__)  # rank by rank
    parts = dict(zip(arrived, gathered, strict=True))  # pyright: ignore[reportArgumentType]
    running, before = None, []
    for number in range(len(owners)):
        state, decay = parts[number].tensor_split([shape.numel()], -1)
        part = SegmentState(state.unflatten(-1, shape), decay)
        before.append(torch.zeros_like(part.state) if running is None else running.state)
        running = part if running is None else merge_states(running, part)
    # All of them in one tensor, so that every rank's result depends on what was gathered and all go back together.
    own = [number for number, owner in enumerate(owners) if owner == context.rank]
    assert running is not None
    return shards.of_pieces(torch.stack(before)[own]), running.state


def _state(k: Tensor, v: Tensor, g: Tensor | None, keys: Callable[[Tensor], Tensor] | None) -> SegmentState:
    """``linear_attention_state`` part by part, each computed again in the backward pass: little of it is in memory."""

    def of_part(k: Tensor, v: Tensor, g: Tensor | None) -> SegmentState:
        return linear_attention_state(k if keys is None else keys(k), v, g)

    total = None
    for at in range(0, max(k.shape[1], 1), TOKENS_AT_ONCE):
        part = slice(at, at + TOKENS_AT_ONCE)
        gates = g if g is None or g.dim() == 1 else g[:, part]
        state: SegmentState = checkpoint(  # pyright: ignore[reportAssignmentType]
            of_part, k[:, part], v[:, part], gates, use_reentrant=False, preserve_rng_state=False
        )
        total = state if total is None else merge_states(total, state)
    assert total is not None
    return total
