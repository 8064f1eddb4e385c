"""Softmax attention layer, full or with a sliding window."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.flash_attention import MOST_NEW_TOKENS, flash_attention, flash_decode
from ..kernels.flash_attention.options import check_number
from ..kernels.runtime.sequences import sequence_slices
from . import kv_cache
from .mixer import Cache, CacheSpec, TokenMixer, apply_norm, check_positive, head_size
from .parallel import Shards, local_shards
from .parallel.halo import attend_with_halo
from .parallel.ring import ring_attention
from .rotary import apply_rotary, rotary_frequencies, token_positions
from .slopes import Slopes, decay_slopes


class SoftmaxAttention(TokenMixer):
    """Multi-head softmax attention with grouped key/value heads, rotary positions and an optional sliding window.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2; grouped heads: Ainslie et al., "GQA" (2023);
    window: Beltagy et al., "Longformer" (2020), section 3.1.

    Args:
        hidden_size: model dimension.
        num_heads: number of query heads.
        num_key_value_heads: number of key/value heads, a divisor of num_heads; num_heads by default.
        head_dim: hidden_size / num_heads by default; even with rotary positions.
        window: a token attends to itself and the ``window - 1`` tokens before it; None for all earlier tokens.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: scaling of the rotary frequencies to longer contexts (see ``rotary_frequencies``); None for none.
        alibi: subtract a slope per head times the distance in tokens from the scores, usually instead of rotary
            positions. Press et al., "Train Short, Test Long" (2022), section 3.
        sinks: add a learned score per head to the softmax denominator. "gpt-oss Model Card" (2025), section 2.2.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap. "Gemma 2" (2024), section 2.
        qk_norm: apply RMSNorm to every query and key head before the rotary positions. "Qwen3 Technical Report"
            (2025), section 2.
        norm_eps: epsilon of the norms of ``qk_norm``.
        bias: add biases to all four projections.
        backend: backend of the operators.

    The cache holds keys, values and the number of tokens per sequence (see ``kv_cache``).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        alibi: bool = False,
        sinks: bool = False,
        softcap: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
    ):
        super().__init__(hidden_size)
        kv_heads = (
            num_heads if num_key_value_heads is None else check_positive("num_key_value_heads", num_key_value_heads)
        )
        if check_positive("num_heads", num_heads) % kv_heads:
            raise ValueError(f"num_key_value_heads: expected a divisor of num_heads {num_heads}, got {kv_heads}")
        self.head_dim = head_size(hidden_size, num_heads) if head_dim is None else check_positive("head_dim", head_dim)
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {self.head_dim}")
        if rope_scaling is not None:
            if rope_theta is None:
                raise ValueError("rope_scaling: expected None without rope_theta, got a scaling")
            rotary_frequencies(self.head_dim, rope_theta, rope_scaling)  # checks the options
        check_number("softcap", softcap, positive=True)
        self.growing = ("keys", "values") if window is None else ()
        self.window = window if window is None else check_positive("window", window)
        self.num_heads, self.num_key_value_heads = num_heads, kv_heads
        self.rope_theta, self.rope_scaling, self.softcap, self.backend = rope_theta, rope_scaling, softcap, backend
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.alibi = Slopes(decay_slopes("alibi", num_heads), num_heads) if alibi else None
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        """Return the cache's shapes and dtypes after a prompt; a full cache grows from there (see ``kv_cache``)."""
        kept = ((batch_size, self.window or tokens, self.num_key_value_heads, self.head_dim), dtype)
        return {"keys": kept, "values": kept, "lengths": ((batch_size,), torch.int64)}

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(x, "b t (h d) -> b t h d", d=self.head_dim) for x in (q, k, v))
        if self.qk_norm:
            q, k = apply_norm(self.q_norm, q).to(q.dtype), apply_norm(self.k_norm, k).to(k.dtype)
        if self.rope_theta is not None:
            if position_ids is None:
                position_ids = token_positions(hidden_states, cu_seqlens, cache)
            q, k = (apply_rotary(x, position_ids, self.rope_theta, self.rope_scaling) for x in (q, k))
        shards = local_shards(hidden_states, cu_seqlens, cache)
        if shards is not None:
            o = self._attend_sharded(q, k, v, shards, cache)
        elif cache is not None and "keys" in cache and self._is_step(hidden_states, cu_seqlens):
            kv_cache.append(cache, k, v, None, self.window)
            o = flash_decode(q, cache["keys"], cache["values"], cache_lengths=cache["lengths"], **self._options())
        elif cache is not None and "keys" in cache:
            o = self._attend_chunk(q, k, v, cu_seqlens, cache)
            kv_cache.append(cache, k, v, cu_seqlens, self.window)
        else:
            o = flash_attention(q, k, v, window=self.window, cu_seqlens_q=cu_seqlens, **self._options())
            if cache is not None:
                kv_cache.append(cache, k, v, cu_seqlens, self.window)
        return self.o_proj(rearrange(o, "b t h d -> b t (h d)"))

    def _is_step(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether ``flash_decode`` can run the call: one new token for a ring buffer, a few for a full cache."""
        most = MOST_NEW_TOKENS if self.window is None else 1
        return 1 <= hidden_states.shape[1] <= most and cu_seqlens is None and not torch.is_grad_enabled()

    def _options(self) -> dict[str, Any]:
        """Return the options that ``flash_attention`` and ``flash_decode`` share."""
        slopes = None if self.alibi is None else self.alibi()
        return {"alibi_slopes": slopes, "sinks": self.sinks, "softcap": self.softcap, "backend": self.backend}

    def _attend_sharded(self, q: Tensor, k: Tensor, v: Tensor, shards: Shards, cache: Cache | None) -> Tensor:
        """Return the output of this rank's tokens under sequence_parallel, and fill the cache."""
        options = self._options()
        if self.window is not None:
            o = attend_with_halo(shards, q, k, v, self.window - 1, {**options, "window": self.window})
        elif self.alibi is not None:  # a ring passes only parts of the keys to the operator, without their distances
            o = attend_with_halo(shards, q, k, v, None, options)
        else:
            o = ring_attention(shards, q, k, v, self.sinks, {"softcap": self.softcap, "backend": self.backend})
        if cache is not None:
            kept = shards.last(torch.cat((k, v), -1), self.window or shards.context.tokens, "gather")
            keys, values = kept.chunk(2, -1)
            kv_cache.append(cache, keys, values, None, self.window, skipped=shards.context.tokens - kept.shape[1])
        return o

    def _attend_chunk(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cache: Cache) -> Tensor:
        """Attend from several new tokens to the cached and new keys of each sequence, in one packed call."""
        batch, tokens = q.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch + 1, device=q.device) * tokens
            q, k, v = (rearrange(x, "b t h d -> 1 (b t) h d") for x in (q, k, v))
        keep = None if self.window is None else self.window - 1
        spans = sequence_slices(cu_seqlens)
        keys = [torch.cat((kv_cache.past(cache, "keys", n, keep), k[0, s])) for n, s in enumerate(spans)]
        values = [torch.cat((kv_cache.past(cache, "values", n, keep), v[0, s])) for n, s in enumerate(spans)]
        ends = torch.tensor([0, *(len(x) for x in keys)], device=q.device).cumsum(0)
        o = flash_attention(
            q,
            torch.cat(keys)[None],
            torch.cat(values)[None],
            window=self.window,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=ends,
            **self._options(),
        )
        return rearrange(o, "1 (b t) h d -> b t h d", b=batch)
