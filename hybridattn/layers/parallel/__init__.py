"""Sequence parallelism: a context within which mixers and models compute one sequence on several ranks.

``context`` cuts the sequence into segments; a rank holds one or two of them. A mixer receives data of earlier segments
from other ranks (``exchange``). A linear layer receives the recurrent state (``state_passing``). A convolution receives
its last inputs and a sliding window its last keys and values (``halo``). Full attention receives all keys and values,
rank by rank (``ring``). ``shards`` computes which sequences a rank holds. Outside the context none of this runs.
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
