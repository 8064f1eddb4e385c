"""Sequence parallelism: one sequence over the ranks of a process group, as a context that any mixer runs under.

The sequence is cut in segments (``context``), and a rank's tokens are one or two of them, side by side. What a mixer
needs of earlier segments comes from other ranks (``exchange``): the state of a linear layer (``state_passing``), the
last inputs of a convolution and the keys of a window (``halo``), all keys in turn for full attention (``ring``). ``shards``
says where every sequence lies. Outside the context nothing of this is run.
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
