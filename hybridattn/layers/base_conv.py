"""BASED's gated convolution layer."""

import torch
from torch import Tensor, nn

from .mixer import Cache, CacheSpec, TokenMixer, positive
from .short_convolution import ShortConvolution


class BaseConv(TokenMixer):
    """Gated short convolution: ``W_out (silu(conv(W_1 x)) * W_2 x)``.

    Arora et al., "Zoology" (2023), section 4 and "Simple linear attention language models balance the recall-throughput
    tradeoff" (BASED, 2024), section 4 and its released code.

    Args:
        hidden_size: model dimension.
        kernel_size: taps of the convolution.
        expand: inner dimension over hidden_size.

    The cache holds the convolution's last inputs.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3, expand: int = 2):
        super().__init__()
        inner = positive("hidden_size", hidden_size) * positive("expand", expand)
        self.in_proj = nn.Linear(hidden_size, 2 * inner)
        self.conv = ShortConvolution(inner, kernel_size, activation="silu", bias=True)
        self.out_proj = nn.Linear(inner, hidden_size)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        return self.conv.cache_spec(batch_size, tokens, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, -1)
        return self.out_proj(self.conv(x, cu_seqlens=cu_seqlens, cache=cache) * gate)
