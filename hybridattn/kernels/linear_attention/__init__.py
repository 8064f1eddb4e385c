"""Linear attention with and without decay.

``api`` holds the public operators, ``reference`` the specification, ``chunked`` the torch backend, ``triton`` the
kernels.
"""

from .api import (
    NormalizedState,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
    prefix_linear_attention,
    taylor_linear_attention,
    taylor_linear_attention_step,
)
from .segment_state import SegmentState, linear_attention_state, merge_states

__all__ = [
    "NormalizedState",
    "SegmentState",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "linear_attention",
    "linear_attention_state",
    "linear_attention_step",
    "merge_states",
    "prefix_linear_attention",
    "taylor_linear_attention",
    "taylor_linear_attention_step",
]
