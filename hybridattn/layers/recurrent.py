"""Base class of recurrent token mixers: runs the operator on whole sequences, steps, caches and several ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_attention import NormalizedState
from ..kernels.linear_attention.operands import match_heads
from .mixer import Cache, CacheSpec, TokenMixer, is_step, read_state, write_state
from .parallel import Shards, local_shards
from .parallel.state_passing import initial_states

State = Tensor | NormalizedState


class RecurrentMixer(TokenMixer):
    """Token mixer with an operator that carries a recurrent state from token to token.

    A subclass computes the operator's inputs in ``forward`` and calls ``recur``. Its cache holds the state under
    ``state`` and, for a normalised operator, the sum of keys under ``k_sum``.

    Attributes:
        attend: the operator, ``attend(q, k, v, .., initial_state=, output_final_state=, cu_seqlens=, **options)``.
        step: the operator for new tokens, which updates the state in place: ``step(q, k, v, .., state, **options)``.
        normalize: whether the operator's state is a ``NormalizedState``.
        state_heads, state_dim, value_dim: the state has shape [N,state_heads,state_dim,value_dim].
        decays: numbers per head in the decay that a segment puts on an earlier state.
        state_products: products of a vector and the state per token: one update and one read, or one more.
        backend: backend of the operator.
    """

    attend: Callable[..., Any]
    step: Callable[..., Tensor]
    normalize = False
    decays = 1
    state_products = 2
    state_heads: int
    state_dim: int
    value_dim: int
    backend: str | None

    @property
    def operator_options(self) -> dict[str, Any]:
        """Options of the operator and of its step."""
        return {"backend": self.backend}

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        keys = (batch_size, self.state_heads, self.state_dim)
        kept = self.state_dtype or torch.float32
        spec: CacheSpec = {"state": ((*keys, self.value_dim), kept)}
        return {**spec, "k_sum": (keys, kept)} if self.normalize else spec

    def recur(
        self,
        inputs: tuple[Any, ...],
        hidden_states: Tensor,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
        attend: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Run the operator on the tokens of this call, from the cached state, and store the state after them.

        Args:
            inputs: q, k, v and further inputs of the operator: [B,T,..], a constant per head [H], or None.
            hidden_states, cu_seqlens, cache: the layer's own arguments.
            attend: operator in place of ``self.attend``.

        Returns:
            The operator's output [B,T,H,V].
        """
        attend, options = attend or self.attend, self.operator_options
        state = self._cached_state(cache)
        shards = local_shards(hidden_states, cu_seqlens, cache)
        if shards is not None:
            initial, state = self.shard_states(shards, *inputs[1:])
            packed = (x if x is None or x.dim() == 1 else shards.pack(x) for x in inputs)
            o = shards.unpack(attend(*packed, initial_state=initial, cu_seqlens=shards.offsets, **options)[0])
        elif state is not None and is_step(hidden_states, cu_seqlens):
            o = self.step(*inputs, state, **options)
        else:
            o, state = attend(
                *inputs, initial_state=state, output_final_state=cache is not None, cu_seqlens=cu_seqlens, **options
            )
        if cache is not None and state is not None:
            parts = state if isinstance(state, NormalizedState) else (state,)
            for name, value in zip(("state", "k_sum"), parts, strict=False):
                write_state(cache, name, value, self.state_dtype)
        return o

    def state_keys(self, k: Tensor) -> Tensor:
        """Return the keys of the state, [B,T,H,state_dim], for the operator's keys [B,T,H,K]."""
        return k

    def shard_states(
        self, shards: Shards, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None
    ) -> tuple[State, State]:
        """Return the states before this rank's pieces, and the state after the last token of the whole sequence."""

        def keys(k: Tensor) -> Tensor:
            return match_heads(self.state_keys(k), self.state_heads, 2)

        if not self.normalize:
            return initial_states(shards, k, v, g, keys, beta)
        # The sum of keys equals the state of an additional value column of ones.
        columns = torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)
        before, after = initial_states(shards, k, columns, g, keys)
        return NormalizedState(before[..., :-1], before[..., -1]), NormalizedState(after[..., :-1], after[..., -1])

    def _cached_state(self, cache: Cache | None) -> State | None:
        if cache is None or "state" not in cache:
            return None
        state = read_state(cache, "state")
        return NormalizedState(state, read_state(cache, "k_sum")) if self.normalize else state
