"""JRT's linear attention layer, in which all tokens attend to a whole prefix, also tokens inside it."""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.linear_attention import prefix_linear_attention
from ..kernels.runtime.checks import check_shape, reads_values
from ..kernels.runtime.sequences import check_cu_seqlens
from .mixer import Cache
from .parallel.context import refuse_if_sharded
from .taylor_linear_attention import TaylorLinearAttention


class PrefixLinearAttention(TaylorLinearAttention):
    """BASED's linear attention in which every token also attends to the whole prefix, with separate keys and values.

    Arora et al., "Just read twice: closing the recall gap for recurrent language models" (JRT-RNN, 2024), section 4.
    Attention within the prefix is bidirectional. After the prefix it is causal; without a prefix the whole layer is.
    Once the state contains the prefix, later tokens continue as in ``TaylorLinearAttention``.

    Args:
        hidden_size, num_heads, key_dim, value_dim, backend: as in ``TaylorLinearAttention``.
        tie_prefix: use the causal projections for the prefix's keys and values too. The layer then has no further
            parameters, and its output equals that of a causal layer that reads the prefix twice.

    The cache is that of ``TaylorLinearAttention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 1,
        key_dim: int = 16,
        value_dim: int | None = None,
        tie_prefix: bool = False,
        backend: str | None = None,
    ):
        super().__init__(hidden_size, num_heads, key_dim, value_dim, backend)
        own = not tie_prefix
        self.k_prefix_proj = nn.Linear(hidden_size, num_heads * self.key_dim, bias=False) if own else None
        self.v_prefix_proj = nn.Linear(hidden_size, num_heads * self.value_dim, bias=False) if own else None

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence, whose first tokens may be a prefix.

        Args:
            hidden_states, cu_seqlens, position_ids, cache: as in ``TokenMixer.forward``.
            prefix_lengths: int32 or int64 [N], the length of each sequence's prefix in tokens. This call must be the
                sequence's first and contain the whole prefix. By default there is no prefix.

        Returns:
            [B,T,hidden_size].

        Raises:
            ValueError: prefix_lengths has a wrong shape or dtype, exceeds a sequence's length, or comes with a cache
                that already holds tokens.
        """
        if prefix_lengths is None:
            return self._mix(hidden_states, cu_seqlens, cache)
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        refuse_if_sharded("prefix_lengths: expected None (attention in a prefix is bidirectional), got lengths")
        if cache is not None and "state" in cache:
            raise ValueError("prefix_lengths: expected None after the first call with a cache, got lengths")
        prefix = _prefix(hidden_states, cu_seqlens, prefix_lengths)
        k = (self.k_prefix_proj or self.k_proj)(prefix)
        v = (self.v_prefix_proj or self.v_proj)(prefix)
        k = rearrange(k, "n m (h d) -> n m h d", d=self.key_dim)
        v = rearrange(v, "n m (h d) -> n m h d", d=self.value_dim)
        attend = partial(prefix_linear_attention, k_prefix=k, v_prefix=v, prefix_lengths=prefix_lengths)
        return self._mix(hidden_states, cu_seqlens, cache, attend)


def _prefix(hidden_states: Tensor, cu_seqlens: Tensor | None, prefix_lengths: Tensor) -> Tensor:
    """Return the first M tokens of every sequence [N,M,hidden_size]; the operator ignores those after the prefix."""
    batch, tokens = hidden_states.shape[:2]
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, batch, tokens, False)
    lengths = torch.full((batch,), tokens, device=hidden_states.device) if cu_seqlens is None else cu_seqlens.diff()
    check_shape({"N": len(lengths)}, "prefix_lengths", prefix_lengths, "N")
    if prefix_lengths.dtype not in (torch.int32, torch.int64) or prefix_lengths.device != hidden_states.device:
        raise ValueError(
            f"prefix_lengths: expected int32 or int64 on {hidden_states.device}, "
            f"got {prefix_lengths.dtype} on {prefix_lengths.device}"
        )
    outside = (prefix_lengths < 0) | (prefix_lengths > lengths)
    if reads_values(prefix_lengths, False) and bool(outside.any()):
        raise ValueError(
            f"prefix_lengths: expected 0 to each sequence's length {lengths.tolist()}, got {prefix_lengths.tolist()}"
        )
    if cu_seqlens is None:
        return hidden_states  # not cut to the lengths: reading them would synchronise and break a traced graph
    if torch.compiler.is_compiling():
        longest = tokens  # torch.compile traces without values, so that the longest prefix is unknown
    else:
        longest = int(prefix_lengths.max()) if prefix_lengths.numel() else 0
    places = cu_seqlens[:-1, None].long() + torch.arange(longest, device=hidden_states.device)
    return hidden_states[0, places.clamp(max=max(tokens - 1, 0))]
