"""The sequences within one rank's tokens: packed offsets, and the sequences that continue across segments."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.runtime.sequences import check_cu_seqlens, sequence_ids
from .context import Segment, SequenceParallel, current
from .exchange import Range, fetch


class Shards:
    """This rank's tokens [B,T,..] as one packed row of pieces. A piece is the part of one sequence in one segment.

    Only the first piece of a segment can continue a sequence from an earlier segment. Only the sequence of the last
    piece can continue in a later one. So a segment receives one state, one convolution input or one halo, however many
    sequences there are.

    Attributes:
        context: the active context.
        offsets: ``cu_seqlens`` of the packed row [N+1], for its N pieces; ``ends`` holds the same numbers as a list.
        continued: (index among this rank's segments, row, piece) of every piece that continues an earlier sequence.
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
                if self.sequence_start(segment) < start:
                    self.continued.append((number, row, len(ends) - 1))
                cuts = [*self._starts[bisect_right(self._starts, start) : bisect_left(self._starts, stop)], stop]
                ends += [row * context.count(context.rank) + at + cut - start for cut in cuts]
        self.ends, self.offsets = ends, torch.tensor(ends, device=device)

    def sequence_start(self, segment: Segment) -> int:
        """Return where the sequence of a segment's first token begins; ``segment.start`` if it is in no sequence."""
        if segment.start >= min(segment.stop, self._end):
            return segment.start
        return self._starts[bisect_right(self._starts, segment.start) - 1]

    def state_start(self, segment: Segment) -> int:
        """Return the first token that the state after a segment depends on: its start, or that of its last sequence."""
        return max([segment.start, *self._starts[: bisect_left(self._starts, segment.stop)][-1:]])

    def has_start(self, segment: Segment) -> bool:
        """Whether a sequence begins in the segment."""
        return bisect_left(self._starts, segment.start) < bisect_left(self._starts, segment.stop)

    def first_piece(self, segment: Segment) -> int:
        """Return the number of tokens of a segment's first piece."""
        later = self._starts[bisect_right(self._starts, segment.start) :][:1]
        return max(0, min([segment.stop, self._end, *later]) - segment.start)

    @cached_property
    def positions(self) -> Tensor:
        """The position of every token in its sequence, [1,T]."""
        at = torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in self.context.own])
        if self.cu_seqlens is None:
            return at[None]
        return (at - self.cu_seqlens.long()[sequence_ids(self.cu_seqlens, self.context.tokens)[at]])[None]

    def pack(self, x: Tensor) -> Tensor:
        """Pack rows into one: [B,T,..] -> [1,BT,..]."""
        return x.flatten(0, 1)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Undo ``pack``: [1,BT,..] -> [B,T,..]."""
        return x[0].unflatten(0, (self.batch, x.shape[1] // self.batch if self.batch else 0))

    def to_pieces(self, x: Tensor) -> Tensor:
        """Map values of this rank's S segments [S,B,..] to its pieces [N,..]; zeros if a piece begins a sequence."""
        number, row, piece = self._places
        return x.new_zeros(len(self.ends) - 1, *x.shape[2:]).index_put((piece,), x[number, row])

    @cached_property
    def _places(self) -> Tensor:
        """``continued`` as [3,n]."""
        return torch.tensor(self.continued, device=self.device, dtype=torch.long).view(-1, 3).T

    def before(self, x: Tensor, size: int | None, kind: str) -> list[Tensor]:
        """Return the last ``size`` tokens (all if None) before each own segment, in the same sequence: [B,n,..]."""

        def wanted(segment: Segment) -> Range:
            begin = self.sequence_start(segment)
            return (begin if size is None else max(begin, segment.start - size), segment.start)

        return self._fetch(x, wanted, kind)

    def last(self, x: Tensor, size: int, kind: str) -> Tensor:
        """Return the last ``size`` tokens of the whole sequence on every rank; all if there are fewer."""
        context = self.context
        return fetch(context, x, [[(max(context.tokens - size, 0), context.tokens)]] * context.size, kind)[0]

    def _fetch(self, x: Tensor, wanted: Callable[[Segment], Range], kind: str) -> list[Tensor]:
        context = self.context
        return fetch(context, x, [[wanted(s) for s in context.of(rank)] for rank in range(context.size)], kind)


def local_shards(x: Tensor, cu_seqlens: Tensor | None, cache: dict[str, Tensor] | None) -> Shards | None:
    """Return the pieces of a call with this rank's tokens x [B,T,..]; None outside of ``sequence_parallel``.

    Raises:
        ValueError: x does not have this rank's number of tokens, ``cu_seqlens`` does not fit the whole sequence, or
            both ``cu_seqlens`` and a cache are given.
    """
    context = current()
    if context is None:
        return None
    context.check("hidden_states", x)
    if cache is not None and cu_seqlens is not None:
        raise ValueError("cache: expected None with cu_seqlens under sequence_parallel, got a cache")
    # An inference-mode tensor has no version counter, so that every layer has to read it again.
    version = None if cu_seqlens is None else object() if cu_seqlens.is_inference() else cu_seqlens._version
    key = (cu_seqlens, version, len(x), x.device)
    if context.memo is None or context.memo[0][0] is not cu_seqlens or context.memo[0][1:] != key[1:]:
        if cu_seqlens is not None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, len(x), context.tokens, True)
        # The result is stored for all layers, since reading the offsets synchronises the GPU.
        context.memo = (key, Shards(context, len(x), cu_seqlens, x.device))
    return context.memo[1]
