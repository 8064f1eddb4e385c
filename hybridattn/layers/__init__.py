"""Token mixers and the modules around them, usable alone: they import torch and the operators, nothing else.

A mixer is called as ``mixer(hidden_states, cu_seqlens=None, position_ids=None, cache=None)``; see ``TokenMixer``.
"""

from .base_conv import BaseConv
from .gated_linear_attention import GatedLinearAttention
from .linear_attention import LinearAttention
from .mixer import Cache, TokenMixer
from .short_convolution import ShortConvolution
from .softmax_attention import SoftmaxAttention
from .taylor_linear_attention import TaylorLinearAttention

__all__ = [
    "BaseConv",
    "Cache",
    "GatedLinearAttention",
    "LinearAttention",
    "ShortConvolution",
    "SoftmaxAttention",
    "TaylorLinearAttention",
    "TokenMixer",
]
