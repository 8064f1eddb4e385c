"""States of linear attention, passed from segment to segment: one all-gather forward, one reduce-scatter backward."""

import torch
from torch import Tensor

from ...kernels.linear_attention import SegmentState, linear_attention_state, merge_states
from .exchange import AllGather
from .shards import Shards


def initial_states(shards: Shards, k: Tensor, v: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The states that this rank's pieces start from, and the one behind the last token.

    A segment in which a sequence begins lets nothing of earlier ones through: its decay is 0, and its state that of its
    last sequence. So what is sent depends neither on the number of tokens nor on that of sequences.

    Args:
        k: [B,T,H,K], of this rank.
        v: [B,T,H,V].
        g: natural-log decay, [B,T,H,K], [B,T,H] or [H]; none by default.

    Returns:
        fp32 or wider, [N,H,K,V] for every piece, and [B,H,K,V].
    """
    context = shards.context
    sent = []
    for segment, at in context.places(context.rank):
        part = slice(at + shards.leaves(segment) - segment.start, at + segment.stop - segment.start)
        gates = g if g is None or g.dim() == 1 else g[:, part]
        state, decay = linear_attention_state(k[:, part], v[:, part], gates)
        sent.append(torch.cat((state.flatten(2), decay * (not shards.resets(segment))), -1))
    gathered = AllGather.apply(torch.stack(sent), context, "states")
    numbers = [segment for rank in range(context.size) for segment in range(len(context.segments))
               if context.segments[segment].owner == rank]  # fmt: skip
    parts = dict(zip(numbers, gathered, strict=True))  # pyright: ignore[reportArgumentType]
    size = k.shape[-1] * v.shape[-1]
    running = None
    before = []
    for number in range(len(context.segments)):
        state, decay = parts[number].split([size, parts[number].shape[-1] - size], -1)
        part = SegmentState(state.unflatten(-1, (k.shape[-1], v.shape[-1])), decay)
        before.append(torch.zeros_like(part.state) if running is None else running.state)
        running = part if running is None else merge_states(running, part)
    # All of them in one tensor, so that every rank's result depends on what was gathered and all go back together.
    own = [number for number, segment in enumerate(context.segments) if segment.owner == context.rank]
    assert running is not None
    return shards.of_pieces(torch.stack(before)[own]), running.state
