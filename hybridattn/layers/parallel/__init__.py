"""Sequence parallelism: one sequence over the ranks of a process group, as a context that any mixer runs under.

The sequence is cut into segments (``context``); a rank holds one or two of them. A mixer gets what it needs of earlier
segments from other ranks (``exchange``): a linear layer the state (``state_passing``), a convolution its last inputs
and a window its last keys (``halo``), full attention all keys in turn (``ring``). ``shards`` says where every sequence
lies. None of this runs outside the context.
"""

from .context import SequenceParallel, current, sequence_parallel
from .exchange import gather_sequence, shard_sequence
from .shards import Shards, local_shards

__all__ = [
    "SequenceParallel",
    "Shards",
    "current",
    "gather_sequence",
    "local_shards",
    "sequence_parallel",
    "shard_sequence",
]
