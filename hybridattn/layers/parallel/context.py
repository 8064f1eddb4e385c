"""The sequence_parallel context, and the segments of the sequence that each rank holds."""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

LAYOUTS = ("contiguous", "zigzag")


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of the whole sequence, and the rank that holds them (``owner``)."""

    owner: int
    start: int
    stop: int


class SequenceParallel:
    """One sequence cut into segments over the ranks of a process group; ``sequence_parallel`` constructs it.

    Attributes:
        group: the process group.
        rank: rank of this process in the group.
        size: number of ranks of the group.
        tokens: number of tokens of the whole sequence.
        segments: all segments, in the order of the sequence; ``ends`` holds the ``stop`` of each.
        own: this rank's segments, in the order of the sequence. A rank's tokens are their concatenation.
        traffic: bytes that this rank has sent to others so far, forward and backward, by kind: ``states`` of linear
            layers, inputs of a ``convolution``, keys and values of a ``window`` and of full attention (``ring``; with
            ALiBi ``keys``), ``labels``, and ``gather`` (``gather_sequence`` and caches). The sum of the loss is not
            counted.
    """

    def __init__(self, tokens: int | Sequence[int], group: Any, layout: str):
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {list(LAYOUTS)}, got {layout!r}")
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group: expected torch.distributed to be initialised (init_process_group), got none")
        mesh = getattr(group, "get_group", None)
        if mesh is not None and group.ndim != 1:
            raise ValueError(f"group: expected a mesh of one dimension, got {group.ndim}; name one, as in mesh['sp']")
        self.group: Any = dist.group.WORLD if group is None else mesh() if mesh else group
        self.rank, self.size, self.layout = dist.get_rank(self.group), dist.get_world_size(self.group), layout
        if self.rank < 0:
            raise ValueError("group: expected a group with this process, got one without it")
        owners = list(range(self.size))
        if layout == "zigzag":  # balances causal attention: later segments attend to more keys
            owners += owners[::-1]
        ends = []
        if isinstance(tokens, int | Integral):  # also a numpy integer
            ends = [int(tokens) * (i + 1) // len(owners) for i in range(len(owners))]
        else:
            with suppress(TypeError):  # not iterable, or not integers: reported below
                ends = list(accumulate(operator.index(x) for x in tokens))
        if len(ends) != len(owners) or ends != sorted(ends) or ends[0] < 0:
            raise ValueError(
                f"tokens: expected an integer, or the lengths of {len(owners)} segments ({layout}), got {tokens!r}"
            )
        self.tokens, self.ends = ends[-1], ends
        self.segments = [Segment(*x) for x in zip(owners, [0, *ends[:-1]], ends, strict=True)]
        self.own = self.of(self.rank)
        self.traffic: Counter[str] = Counter()
        self.memo: tuple[tuple[Any, ...], Any] | None = None  # cached key and result of ``local_shards``

    def of(self, rank: int) -> list[Segment]:
        """Return the segments of a rank, in the order of the sequence."""
        return [segment for segment in self.segments if segment.owner == rank]

    def count(self, rank: int) -> int:
        """Return the number of tokens that a rank holds."""
        return sum(segment.stop - segment.start for segment in self.of(rank))

    def places(self, rank: int) -> list[tuple[Segment, int]]:
        """Return (segment, index of its first token among the rank's tokens) for each segment of a rank."""
        own = self.of(rank)
        return list(zip(own, accumulate((s.stop - s.start for s in own), initial=0), strict=False))

    def check(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Check that dimension ``dim`` of ``x`` has this rank's number of tokens.

        Raises:
            ValueError: it has another size; ``name`` is the argument in the message.
        """
        if x.dim() <= dim or x.shape[dim] != self.count(self.rank):
            raise ValueError(
                f"{name}: expected {self.count(self.rank)} tokens, rank {self.rank}'s share of {self.tokens} under "
                f"sequence_parallel, got {list(x.shape)}"
            )


# A plain global, not a context variable: on CUDA, autograd recomputes checkpointed layers in a thread of its own.
_current: SequenceParallel | None = None


def current() -> SequenceParallel | None:
    """Return the active context of this process, or None."""
    return _current


@contextmanager
def sequence_parallel(
    tokens: int | Sequence[int], group: Any = None, layout: str = "contiguous"
) -> Iterator[SequenceParallel]:
    """Let mixers and models compute one sequence on several ranks, each rank with its own tokens.

    Within the context, inputs and outputs of mixers and models are those of the rank's tokens. n ranks compute the same
    outputs as one rank. The sum of the gradients over the ranks equals the gradients of one rank. Every rank of the
    group must make the same calls in the same order. The backward pass may run after the context has ended, except with
    activation checkpointing. States are exchanged as in Sun et al., "LASP-2" (2025), section 3. Full attention is that
    of Liu et al., "Ring Attention with Blockwise Transformers" (2023), section 3.

    Args:
        tokens: T, the number of tokens of the whole sequence, which is cut into segments of nearly equal length.
            Alternatively the length of every segment: n lengths, or 2n for ``"zigzag"``; they may be 0.
        group: a process group, a ``DeviceMesh`` of one dimension, or None for all processes.
        layout: ``"contiguous"``: rank i holds segment i of n. ``"zigzag"``: rank i holds segments i and 2n - 1 - i of
            2n, which balances the work of full attention. "The Llama 3 Herd of Models" (2024), section 3.3.2.

    All arguments of mixers and models with a time dimension have the rank's tokens only (see ``shard_sequence``). The
    offsets ``cu_seqlens`` and ``cu_seq_lens_q`` are those of the whole sequence. Caches must be empty. After the call,
    the caches of every rank hold the whole sequence, as on one rank.

    Raises:
        ValueError: torch.distributed is not initialised, this process is not in the group, or an argument is wrong.
            Within the context, calls with padding, prefixes or caches that already hold tokens raise it too.
    """
    global _current
    outer, _current = _current, SequenceParallel(tokens, group, layout)
    try:
        yield _current
    finally:
        _current = outer


def refuse_if_sharded(message: str) -> None:
    """Raise a ValueError with ``message`` if a sequence_parallel context is active."""
    if _current is not None:
        raise ValueError(f"{message} under sequence_parallel")
