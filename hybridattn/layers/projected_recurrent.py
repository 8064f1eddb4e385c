"""Base class of recurrent layers with projections of q, k and v, short convolutions, output gate and norm."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import gated_linear_attention, gated_linear_attention_step
from . import parallel
from .mixer import Cache, CacheSpec, apply_norm, check_positive, store
from .recurrent import RecurrentMixer
from .rotary import apply_rotary, token_positions
from .short_convolution import ShortConvolution


class ProjectedRecurrentMixer(RecurrentMixer):
    """Compute ``W_o (gate(W_g x) * norm(o))``; o is the operator of q, k and v = activation(W x), and of its gates.

    A subclass defines the operator's gates (``log_decay``, ``gates``), the ``activation``, and the norm (``g_norm``),
    which covers the values of one head [V] or of all heads [H,V]. It may replace the operator, the output gate's
    activation (``gate``) and its projection (``g_proj``; None for no output gate).

    Args:
        hidden_size: model dimension.
        num_heads: heads of q and k.
        key_dim: K, per head; even with rotary positions.
        value_dim: V, per head.
        rope_theta: base of the rotary frequencies of q and k; None for no rotary positions.
        backend: backend of the operator.
        conv_size: taps of a short convolution, followed by silu, of each of q, k and v; None for none.
        num_value_heads: H, heads of v and of the state, a multiple of num_heads; num_heads by default.

    The cache holds the state [N,H,K,V] and the last inputs of the convolutions. With rotary positions it also holds
    the number of tokens per sequence [N].
    """

    attend = staticmethod(gated_linear_attention)
    step = staticmethod(gated_linear_attention_step)
    gate: Callable[[Tensor], Tensor] = staticmethod(F.silu)
    g_norm: nn.RMSNorm | nn.LayerNorm
    g_proj: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        rope_theta: float | None = None,
        backend: str | None = None,
        conv_size: int | None = None,
        num_value_heads: int | None = None,
    ):
        super().__init__(hidden_size)
        self.num_heads, self.backend, self.rope_theta = check_positive("num_heads", num_heads), backend, rope_theta
        self.key_dim, self.value_dim = check_positive("key_dim", key_dim), check_positive("value_dim", value_dim)
        self.state_dim = key_dim
        self.state_heads = num_heads if num_value_heads is None else check_positive("num_value_heads", num_value_heads)
        if self.state_heads % num_heads:
            raise ValueError(f"num_value_heads: expected a multiple of num_heads {num_heads}, got {num_value_heads}")
        if rope_theta is not None and key_dim % 2:
            raise ValueError(f"key_dim: expected an even number for rotary positions, got {key_dim}")
        keys, values = num_heads * key_dim, self.state_heads * value_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (
            None if conv_size is None else ShortConvolution(size, conv_size, activation="silu", cache_name=name)
            for name, size in (("q_conv", keys), ("k_conv", keys), ("v_conv", values))
        )

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        """Return the natural log of the decay, at most 0, [H], [B,T,H] or [B,T,H,K]; None for no decay."""
        raise NotImplementedError

    def gates(self, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
        """Return the operator's inputs after q, k and v."""
        return (self.log_decay(hidden_states),)

    def activation(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the activated projections q, k [B,T,HK] and v [B,T,HV]; the base class changes none."""
        return q, k, v

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        spec = super().cache_spec(batch_size, tokens, dtype)
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            spec |= {} if conv is None else conv.cache_spec(batch_size, tokens, dtype)
        return spec if self.rope_theta is None else {**spec, "lengths": ((batch_size,), torch.int64)}

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        q, k, v = (
            x if conv is None else conv(x, cu_seqlens=cu_seqlens, cache=cache)
            for x, conv in zip((q, k, v), convolutions, strict=True)
        )
        q, k, v = self.activation(q, k, v)
        q, k = (rearrange(x, "b t (h d) -> b t h d", d=self.key_dim) for x in (q, k))
        v = rearrange(v, "b t (h d) -> b t h d", d=self.value_dim)
        if self.rope_theta is not None:
            if position_ids is None:
                position_ids = token_positions(hidden_states, cu_seqlens, cache)
            q, k = (apply_rotary(x, position_ids, self.rope_theta) for x in (q, k))
        o = self.recur((q, k, v, *self.gates(hidden_states)), hidden_states, cu_seqlens, cache)
        if cache is not None and self.rope_theta is not None:
            _count_tokens(cache, hidden_states, cu_seqlens)
        o = rearrange(apply_norm(self.g_norm, o), "b t h d -> b t (h d)")
        return self.o_proj(o if self.g_proj is None else o * self.gate(self.g_proj(hidden_states)))


def _count_tokens(cache: Cache, hidden_states: Tensor, cu_seqlens: Tensor | None) -> None:
    """Add the number of new tokens of every sequence to ``lengths`` in the cache."""
    context = parallel.current()
    tokens = hidden_states.shape[1] if context is None else context.tokens
    if cu_seqlens is None:
        added = torch.full((len(hidden_states),), tokens, device=hidden_states.device)
    else:
        added = cu_seqlens.diff()
    store(cache, "lengths", added.long() + cache.get("lengths", 0))
