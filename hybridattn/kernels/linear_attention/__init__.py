"""Linear attention with and without decay: ``api`` is the public face, ``reference`` the specification,
``chunked`` the torch backend."""

from .api import (
    NormalizedState,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
    taylor_linear_attention,
    taylor_linear_attention_step,
)

__all__ = [
    "NormalizedState",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "linear_attention",
    "linear_attention_step",
    "taylor_linear_attention",
    "taylor_linear_attention_step",
]
