"""The decoder's block: token mixer and MLP with norms and residual connections.

This module does not import transformers' model code, whose import takes seconds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ...layers import PrefixLinearAttention, ShortConvolution
from ...layers.mixer import INPUT_CONV, CacheSpec
from ..unpadding import Packing
from .cache import mixer_caches
from .configuration import HybridAttnConfig
from .mixers import build_mixer


class MLP(nn.Module):
    """SwiGLU feed-forward layer. Shazeer, "GLU Variants Improve Transformer" (2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm block: token mixer, then MLP, each added to the residual stream."""

    def __init__(self, config: HybridAttnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        layers = config.layer_mixers
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.conv = None
        if config.input_conv_size is not None:
            self.conv = ShortConvolution(config.hidden_size, config.input_conv_size, cache_name=INPUT_CONV)
        self.mixer = build_mixer(
            layers[layer_idx].name,
            config.hidden_size,
            layers[layer_idx].options,
            backend=config.backend,
            layer_idx=layer_idx,
            num_layers=len(layers),
        )
        self.mixer.state_dtype = None if config.state_dtype is None else getattr(torch, config.state_dtype)
        self.mlp = None
        if config.intermediate_size is not None:
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        """Return name -> (shape, dtype) of the cache tensors of the mixer and the input convolution."""
        spec = self.mixer.cache_spec(batch_size, tokens, dtype)
        return spec if self.conv is None else spec | self.conv.cache_spec(batch_size, tokens, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor | None = None,
        packing: Packing | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        cache = None if past_key_values is None else mixer_caches(past_key_values)[self.layer_idx].tensors
        x = self.input_layernorm(hidden_states)
        if packing is not None:
            x, cu_seqlens = packing.pack(x), packing.cu_seqlens
        if self.conv is not None:
            x = x + self.conv(x, cu_seqlens=cu_seqlens, cache=cache)
        prefix = {"prefix_lengths": prefix_lengths} if isinstance(self.mixer, PrefixLinearAttention) else {}
        x = self.mixer(x, cu_seqlens=cu_seqlens, position_ids=position_ids, cache=cache, **prefix)
        if packing is not None:
            x = packing.unpack(x, hidden_states)
        hidden_states = hidden_states + x
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states
