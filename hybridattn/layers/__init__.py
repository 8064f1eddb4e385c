"""PyTorch layers: linear, softmax and convolutional token mixers. They work without the models of this package.

A mixer is called as ``mixer(hidden_states, cu_seqlens=None, position_ids=None, cache=None)``; see ``TokenMixer``.
"""

from .base_conv import BaseConv
from .delta_net import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from .gated_linear_attention import GatedLinearAttention
from .lightning_attention import LightningAttention
from .linear_attention import LinearAttention
from .mamba2 import Mamba2
from .mixer import Cache, TokenMixer
from .prefix_linear_attention import PrefixLinearAttention
from .retention import Retention
from .short_convolution import ShortConvolution
from .slopes import decay_slopes
from .softmax_attention import SoftmaxAttention
from .taylor_linear_attention import TaylorLinearAttention

__all__ = [
    "BaseConv",
    "Cache",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "Mamba2",
    "PrefixLinearAttention",
    "Retention",
    "ShortConvolution",
    "SoftmaxAttention",
    "TaylorLinearAttention",
    "TokenMixer",
    "decay_slopes",
]
