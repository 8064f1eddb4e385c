"""Token mixers and the modules around them, usable alone: they import torch and the operators, nothing else.

Every mixer is called as ``mixer(hidden_states, cu_seqlens=None, position_ids=None, cache=None)`` with hidden_states
[B,T,hidden_size] and returns the same shape. ``cache`` is a plain dict that starts empty: the mixer keeps in it what it
needs from one call to the next, tensors with one row per sequence, and ``cache_spec`` says beforehand which ones.
"""

from .base_conv import BaseConv
from .gated_linear_attention import GatedLinearAttention
from .linear_attention import LinearAttention
from .short_convolution import ShortConvolution
from .softmax_attention import SoftmaxAttention

__all__ = ["BaseConv", "GatedLinearAttention", "LinearAttention", "ShortConvolution", "SoftmaxAttention"]
