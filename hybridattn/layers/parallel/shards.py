"""Where the sequences of a call lie: which of them cross the borders of segments, and how a rank's part is packed."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.runtime.sequences import check_cu_seqlens, sequence_ids
from .context import Segment, SequenceParallel, current
from .exchange import Range, fetch


class Shards:
    """This rank's tokens [B,T,..] as one packed row of pieces, each the part of one sequence in one segment.

    Only the first piece of a segment can go on with a sequence that began before it, and only the last one's sequence
    can go on behind it: so what is passed between segments is one state, one tail, one halo for each, however many
    sequences there are.

    Attributes:
        context: the active one.
        offsets: of the pieces [N+1], the ``cu_seqlens`` of the packed row; ``ends`` is the same as numbers.
        continued: (segment among this rank's own, row, piece) wherever a piece goes on with a sequence.
    """

    def __init__(self, context: SequenceParallel, batch: int, cu_seqlens: Tensor | None, device: torch.device):
        self.context, self.batch, self.cu_seqlens, self.device = context, batch, cu_seqlens, device
        bounds = [0, context.tokens] if cu_seqlens is None else cu_seqlens.tolist()
        self._end, self._starts = bounds[-1], sorted(set(bounds[:-1]))
        ends: list[int] = [0]
        self.continued: list[tuple[int, int, int]] = []
        for row in range(batch):
            for number, (segment, at) in enumerate(context.places(context.rank)):
                start, stop = segment.start, min(segment.stop, self._end)
                if stop <= start:
                    continue
                if self.begins(segment) < start:
                    self.continued.append((number, row, len(ends) - 1))
                cuts = [*self._starts[bisect_right(self._starts, start) : bisect_left(self._starts, stop)], stop]
                ends += [row * context.count(context.rank) + at + cut - start for cut in cuts]
        self.ends, self.offsets = ends, torch.tensor(ends, device=device)

    def begins(self, segment: Segment) -> int:
        """Where the sequence of a segment's first token begins; its ``start`` if there is none."""
        if segment.start >= min(segment.stop, self._end):
            return segment.start
        return self._starts[bisect_right(self._starts, segment.start) - 1]

    def leaves(self, segment: Segment) -> int:
        """Where the tokens begin whose state goes on behind a segment: at its start, or with its last sequence."""
        return max([segment.start, *self._starts[: bisect_left(self._starts, segment.stop)][-1:]])

    def resets(self, segment: Segment) -> bool:
        """Does a sequence begin in the segment?"""
        return bisect_left(self._starts, segment.start) < bisect_left(self._starts, segment.stop)

    def first_piece(self, segment: Segment) -> int:
        """Tokens of the first piece of a segment."""
        later = self._starts[bisect_right(self._starts, segment.start) :][:1]
        return max(0, min([segment.stop, self._end, *later]) - segment.start)

    @cached_property
    def positions(self) -> Tensor:
        """Of every token in its sequence, [1,T]."""
        at = torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in self.context.own])
        if self.cu_seqlens is None:
            return at[None]
        return (at - self.cu_seqlens.long()[sequence_ids(self.cu_seqlens, self.context.tokens)[at]])[None]

    def pack(self, x: Tensor) -> Tensor:
        """[B,T,..] -> [1,BT,..]."""
        return x.flatten(0, 1)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1,BT,..] -> [B,T,..]."""
        return x[0].unflatten(0, (self.batch, x.shape[1] // self.batch if self.batch else 0))

    def of_pieces(self, x: Tensor) -> Tensor:
        """What goes into each of this rank's segments, [S,B,..] -> [N,..] of all pieces, zeros for those that begin."""
        number, row, piece = self._places
        return x.new_zeros(len(self.ends) - 1, *x.shape[2:]).index_put((piece,), x[number, row])

    @cached_property
    def _places(self) -> Tensor:
        """``continued`` as [3,n]."""
        return torch.tensor(self.continued, device=self.device, dtype=torch.long).view(-1, 3).T

    def before(self, x: Tensor, size: int | None, kind: str) -> list[Tensor]:
        """The last ``size`` (None: all) tokens before each of this rank's segments in the same sequence, [B,n,..]."""

        def wanted(segment: Segment) -> Range:
            begin = self.begins(segment)
            return (begin if size is None else max(begin, segment.start - size), segment.start)

        return self._fetch(x, wanted, kind)

    def last(self, x: Tensor, size: int, kind: str) -> Tensor:
        """The last ``size`` tokens of the whole sequence, or all, on every rank."""
        context = self.context
        return fetch(context, x, [[(max(context.tokens - size, 0), context.tokens)]] * context.size, kind)[0]

    def _fetch(self, x: Tensor, wanted: Callable[[Segment], Range], kind: str) -> list[Tensor]:
        context = self.context
        return fetch(context, x, [[wanted(s) for s in context.of(rank)] for rank in range(context.size)], kind)


def local_shards(x: Tensor, cu_seqlens: Tensor | None, cache: dict[str, Tensor] | None) -> Shards | None:
    """How a call with this rank's tokens x [B,T,..] is shared out; None outside of ``sequence_parallel``.

    Raises:
        ValueError: x has not this rank's tokens, ``cu_seqlens`` is not of the whole sequence, or there is a cache
            beside it.
    """
    context = current()
    if context is None:
        return None
    context.check("hidden_states", x)
    if cache is not None and cu_seqlens is not None:
        raise ValueError("cache: expected None beside cu_seqlens under sequence_parallel, got a cache")
    # A tensor of inference mode does not say whether it was changed: it is read by every layer.
    version = None if cu_seqlens is None else object() if cu_seqlens.is_inference() else cu_seqlens._version
    key = (cu_seqlens, version, len(x), x.device)
    if context.memo is None or context.memo[0][0] is not cu_seqlens or context.memo[0][1:] != key[1:]:
        if cu_seqlens is not None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, len(x), context.tokens, True)
        # Reading the offsets synchronises a GPU: once for all layers.
        context.memo = (key, Shards(context, len(x), cu_seqlens, x.device))
    return context.memo[1]
