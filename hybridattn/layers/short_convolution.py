"""Short depthwise causal convolution over the tokens of a sequence."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.runtime.sequences import check_cu_seqlens, sequence_ids
from .mixer import Cache, CacheSpec, TokenMixer, check_positive, store
from .parallel import local_shards
from .parallel.halo import convolution_tails


class ShortConvolution(TokenMixer):
    """Depthwise causal convolution: each output combines the last ``kernel_size`` tokens of its channel.

    Poli et al., "Hyena Hierarchy" (2023), section 3.1. H3, Mamba and GLA have short convolutions before their mixers.

    Args:
        hidden_size: number of channels.
        kernel_size: number of taps, which include the current token.
        activation: None or ``"silu"``.
        bias: add a bias per channel.
        cache_name: name of the cached inputs; several convolutions may share one cache.

    The weight [D,1,kernel_size] is laid out as in ``nn.Conv1d``. The cache holds the last ``kernel_size - 1`` inputs.
    """

    shares_cache = True

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int = 4,
        activation: str | None = None,
        bias: bool = False,
        cache_name: str = "conv",
    ):
        super().__init__(hidden_size)
        if activation not in (None, "silu"):
            raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
        self.kernel_size = check_positive("kernel_size", kernel_size)
        self.activation, self.cache_name = activation, cache_name
        self.weight = nn.Parameter(torch.empty(hidden_size, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.kernel_size**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        return {self.cache_name: ((batch_size, self.kernel_size - 1, self.hidden_size), dtype)}

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        past = self.kernel_size - 1
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        shards = local_shards(hidden_states, cu_seqlens, cache)
        if cu_seqlens is not None and shards is None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, hidden_states.shape[0], hidden_states.shape[1], False)
        rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        tail = cache.get(self.cache_name) if cache is not None else None
        if tail is None:
            tail = hidden_states.new_zeros(rows, past, self.hidden_size)
        if shards is not None:
            tails = convolution_tails(shards, hidden_states, past)
            o = shards.unpack(self._packed(shards.pack(hidden_states), tails, shards.offsets)[0])
            if cache is not None:
                kept = shards.last(hidden_states, past, "gather")
                tail = F.pad(kept, (0, 0, past - kept.shape[1], 0))
        elif cu_seqlens is None:
            padded = torch.cat((tail, hidden_states), 1)
            o, tail = self._convolve(padded), padded[:, padded.shape[1] - past :]
        else:
            o, tail = self._packed(hidden_states, tail, cu_seqlens)
        if cache is not None:
            store(cache, self.cache_name, tail)
        return F.silu(o) if self.activation == "silu" else o

    def _convolve(self, padded: Tensor) -> Tensor:
        """Convolve tokens with the ``past`` inputs before them: [B,past+T,D] -> [B,T,D]."""
        weight, bias = self.weight.to(padded.dtype), None if self.bias is None else self.bias.to(padded.dtype)
        if padded.shape[1] <= self.kernel_size:  # at most one token: conv1d costs several times the arithmetic
            if padded.shape[1] < self.kernel_size:  # no token: o still depends on the weights, for zero gradients
                o = padded[:, :0] * weight[:, 0, 0]
            else:
                o = (padded * weight[:, 0].mT).sum(1, keepdim=True)
            return o if bias is None else o + bias
        return F.conv1d(padded.mT, weight, bias, groups=self.hidden_size).mT

    def _packed(self, hidden_states: Tensor, tail: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve packed sequences, each with its own earlier inputs, in one call.

        Tokens after the last sequence get zeros as earlier inputs.

        Args:
            hidden_states: [1,T,D].
            tail: earlier inputs of each sequence [N,past,D].
            cu_seqlens: integer offsets [N+1].

        Returns:
            The output [1,T,D] and the last ``past`` inputs of each sequence [N,past,D].
        """
        past, tokens, sequences = self.kernel_size - 1, hidden_states.shape[1], tail.shape[0]
        cu_seqlens, taps = cu_seqlens.long(), torch.arange(past, device=hidden_states.device)
        number = torch.arange(sequences, device=hidden_states.device)
        places = torch.arange(tokens, device=hidden_states.device) + (sequence_ids(cu_seqlens, tokens) + 1) * past
        starts = (cu_seqlens[:-1] + number * past)[:, None] + taps
        ends = (cu_seqlens[1:] + number * past)[:, None] + taps
        padded = hidden_states.new_zeros(tokens + (sequences + 1) * past, self.hidden_size)
        padded = padded.index_put((places,), hidden_states[0]).index_put((starts,), tail.to(hidden_states.dtype))
        return self._convolve(padded[None])[:, places - past], padded[ends]
