"""Gated short convolution, the layer ``BaseConv`` of Zoology and BASED."""

import torch
from torch import Tensor, nn

from .mixer import Cache, CacheSpec, TokenMixer
from .short_convolution import ShortConvolution


class BaseConv(TokenMixer):
    """Multiply a short convolution elementwise by a gate, in one of two published forms.

    - ``expand=0``: ``conv(x) * (W x) + x``. Arora et al., "Zoology" (2023), section 4.
    - ``expand=n``: ``W_out (silu(conv(W_1 x)) * W_2 x)`` with an inner dimension of n * hidden_size. Arora et al.,
      "Simple linear attention language models balance the recall-throughput tradeoff" (BASED, 2024), section 4.

    Args:
        hidden_size: model dimension.
        kernel_size: taps of the convolution.
        expand: n, the inner dimension divided by hidden_size; 0 selects the first form.

    The cache holds the last ``kernel_size - 1`` inputs of the convolution.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3, expand: int = 2):
        super().__init__(hidden_size)
        if isinstance(expand, bool) or not isinstance(expand, int) or expand < 0:
            raise ValueError(f"expand: expected an integer of at least 0, got {expand!r}")
        inner = hidden_size * max(expand, 1)
        self.in_proj = nn.Linear(hidden_size, 2 * inner if expand else hidden_size)
        self.conv = ShortConvolution(inner, kernel_size, activation="silu" if expand else None, bias=True)
        self.out_proj = nn.Linear(inner, hidden_size) if expand else None

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        return self.conv.cache_spec(batch_size, tokens, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        projected = self.in_proj(hidden_states)
        if self.out_proj is None:
            return self.conv(hidden_states, cu_seqlens=cu_seqlens, cache=cache) * projected + hidden_states
        x, gate = projected.chunk(2, -1)
        return self.out_proj(self.conv(x, cu_seqlens=cu_seqlens, cache=cache) * gate)
