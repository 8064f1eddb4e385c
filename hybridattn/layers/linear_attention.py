"""Linear attention with a feature map and without decay."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import NormalizedState, linear_attention, linear_attention_step
from .mixer import Cache, CacheSpec, TokenMixer, check_rows, head_size, is_step, keep_state, kept_state, positive
from .parallel import Shards, local_shards
from .parallel.state_passing import initial_states

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


class LinearAttention(TokenMixer):
    """Causal linear attention: ``o_t = phi(q_t) sum_{s<=t} phi(k_s)^T v_s``, by default over the same sum of phi(k_s).

    Katharopoulos et al., "Transformers are RNNs" (2020), section 3, with phi(x) = elu(x) + 1.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / num_heads by default.
        value_dim: V, per head; hidden_size / num_heads by default.
        feature_map: phi, ``"elu"`` (elu + 1), ``"relu"`` or ``"identity"``.
        normalize: divide by the sum of the weights; without it the output is scaled by K^-0.5.
        backend: of the operator.

    The cache holds the state [N,H,K,V] and, if ``normalize``, the sum of keys [N,H,K].
    """

    attend = staticmethod(linear_attention)
    step = staticmethod(linear_attention_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "elu",
        normalize: bool = True,
        backend: str | None = None,
    ):
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected one of {sorted(FEATURE_MAPS)}, got {feature_map!r}")
        self.num_heads, self.normalize, self.backend = positive("num_heads", num_heads), normalize, backend
        self.key_dim = head_size(hidden_size, num_heads) if key_dim is None else positive("key_dim", key_dim)
        self.value_dim = head_size(hidden_size, num_heads) if value_dim is None else positive("value_dim", value_dim)
        self.state_dim = self.key_dim
        self.feature_map = feature_map
        self.q_proj = nn.Linear(hidden_size, num_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, hidden_size, bias=False)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        keys = (batch_size, self.num_heads, self.state_dim)
        kept = self.state_dtype or torch.float32
        spec: CacheSpec = {"state": ((*keys, self.value_dim), kept)}
        return {**spec, "k_sum": (keys, kept)} if self.normalize else spec

    def state_keys(self, k: Tensor) -> Tensor:
        """What stands for the keys [B,T,H,K] in the state."""
        return k

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        return self._mix(hidden_states, cu_seqlens, cache, self.attend)

    def _mix(
        self, hidden_states: Tensor, cu_seqlens: Tensor | None, cache: Cache | None, attend: Callable[..., Any]
    ) -> Tensor:
        """The layer on the operator ``attend``, or its step where there is a state and one new token."""
        check_rows(cache, "state", len(hidden_states) if cu_seqlens is None else cu_seqlens.numel() - 1)
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rearrange(phi(x), "b t (h d) -> b t h d", d=self.key_dim) for x in (q, k))
        v = rearrange(v, "b t (h d) -> b t h d", d=self.value_dim)
        options = {"normalize": self.normalize, "backend": self.backend}
        state = None
        if cache is not None and "state" in cache:
            state = kept_state(cache, "state")
            if self.normalize:
                state = NormalizedState(state, kept_state(cache, "k_sum"))
        shards = local_shards(hidden_states, cu_seqlens, cache)
        if shards is not None:
            initial, state = self._states(shards, k, v)
            q, k, v = (shards.pack(x) for x in (q, k, v))
            o = shards.unpack(attend(q, k, v, initial_state=initial, cu_seqlens=shards.offsets, **options)[0])
        elif state is not None and is_step(hidden_states, cu_seqlens):
            o = self.step(q, k, v, state, **options)
        else:
            o, state = attend(
                q, k, v, initial_state=state, output_final_state=cache is not None, cu_seqlens=cu_seqlens, **options
            )
        if cache is not None and state is not None:
            kept = state if isinstance(state, NormalizedState) else (state,)
            for name, value in zip(("state", "k_sum"), kept, strict=False):
                keep_state(cache, name, value, self.state_dtype)
        return self.o_proj(rearrange(o, "b t h d -> b t (h d)"))

    def _states(self, shards: Shards, k: Tensor, v: Tensor) -> Any:
        """The initial states and the final one, under sequence_parallel."""
        if not self.normalize:
            return initial_states(shards, k, v, keys=self.state_keys)
        # The sum of keys is the state of one more value, 1.
        states = initial_states(shards, k, torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1), keys=self.state_keys)
        return [NormalizedState(state[..., :-1], state[..., -1]) for state in states]
