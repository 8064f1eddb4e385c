"""Which rank holds which tokens, and the context that says so to the mixers."""

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
    """Tokens ``start`` to ``stop`` of the whole sequence, and the rank that holds them."""

    owner: int
    start: int
    stop: int


class SequenceParallel:
    """A sequence of ``tokens`` over the ranks of a group; made by ``sequence_parallel``.

    Attributes:
        group: the process group.
        rank, size: of this process in the group, and of the group.
        tokens: of the whole sequence.
        segments: of the whole sequence, in its order; ``ends`` is where each one stops.
        own: those of this rank, in order, which is how its tokens lie side by side.
        traffic: bytes that this rank has sent to others so far, forward and backward, by what they are: ``states`` of
            linear layers, ``convolution`` inputs, keys and values of a ``window`` and of full attention (``ring``;
            with ALiBi ``keys``), ``labels``, ``gather`` (by ``gather_sequence`` and for caches); not the loss.
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
            raise ValueError("group: expected one that this process is in, got another")
        owners = list(range(self.size))
        if layout == "zigzag":  # of a causal sequence late segments see much and early ones little
            owners += owners[::-1]
        ends = []
        if isinstance(tokens, int | Integral):  # numpy's, too
            ends = [int(tokens) * (i + 1) // len(owners) for i in range(len(owners))]
        else:
            with suppress(TypeError):  # of what cannot be counted or is no whole number
                ends = list(accumulate(operator.index(x) for x in tokens))
        if len(ends) != len(owners) or ends != sorted(ends) or ends[0] < 0:
            raise ValueError(f"tokens: expected their number, or that of {len(owners)} segments each, got {tokens!r}")
        self.tokens, self.ends = ends[-1], ends
        self.segments = [Segment(*x) for x in zip(owners, [0, *ends[:-1]], ends, strict=True)]
        self.own = self.of(self.rank)
        self.traffic: Counter[str] = Counter()
        self.memo: tuple[tuple[Any, ...], Any] | None = None  # of ``local_shards``

    def of(self, rank: int) -> list[Segment]:
        """The segments of a rank, in order."""
        return [segment for segment in self.segments if segment.owner == rank]

    def count(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(segment.stop - segment.start for segment in self.of(rank))

    def places(self, rank: int) -> list[tuple[Segment, int]]:
        """The segments of a rank, and where each begins among the rank's tokens."""
        own = self.of(rank)
        return list(zip(own, accumulate((s.stop - s.start for s in own), initial=0), strict=False))

    def check(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Raise a ValueError unless ``x`` has this rank's tokens."""
        if x.dim() <= dim or x.shape[dim] != self.count(self.rank):
            raise ValueError(
                f"{name}: expected {self.count(self.rank)} tokens, rank {self.rank}'s share of {self.tokens} under "
                f"sequence_parallel, got {list(x.shape)}"
            )


# Not a context variable: a checkpointed layer is recomputed in the backward pass, for CUDA in a thread of autograd's.
_current: SequenceParallel | None = None


def current() -> SequenceParallel | None:
    """The context that is active in this process."""
    return _current


@contextmanager
def sequence_parallel(
    tokens: int | Sequence[int], group: Any = None, layout: str = "contiguous"
) -> Iterator[SequenceParallel]:
    """Within it, mixers and models take a rank's part of a sequence and give that part of their output.

    n ranks then compute what one would: outputs, and gradients once those of all ranks are added up. Every rank of the
    group makes the same calls in the same order. Backward passes may come after it, but for recomputed (checkpointed)
    layers, whose backward pass belongs inside. States pass as in Sun et al., "LASP-2" (2025),
    section 3; full attention is that of Liu et al., "Ring Attention with Blockwise Transformers" (2023), section 3.

    Args:
        tokens: T, of the whole sequence, which is cut as evenly as can be; or the length of every segment: n of them,
            2n for ``"zigzag"``, some of which may be 0.
        group: a process group, a ``DeviceMesh`` of one dimension, or None for all processes.
        layout: ``"contiguous"``, rank i holds segment i of n; or ``"zigzag"``, segments i and 2n - 1 - i of 2n, which
            shares out the work of full attention evenly. "The Llama 3 Herd of Models" (2024), section 3.3.2.

    Every argument of mixers and models that has a time dimension is the rank's part (see ``shard_sequence``), but
    ``cu_seqlens`` and ``cu_seq_lens_q`` are the whole sequence's. Caches are to be empty, and hold afterwards on every
    rank what one rank would have.

    Raises:
        ValueError: torch.distributed is not initialised, the group is another, or an argument is not as above; inside,
            for what has no meaning there: padding, prefixes, caches that already hold tokens.
    """
    global _current
    outer, _current = _current, SequenceParallel(tokens, group, layout)
    try:
        yield _current
    finally:
        _current = outer


def refuse(what: str) -> None:
    """Raise a ValueError if a context is active: ``what`` has no meaning there."""
    if _current is not None:
        raise ValueError(f"{what} under sequence_parallel")
