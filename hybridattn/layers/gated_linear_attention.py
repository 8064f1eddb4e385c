"""Gated linear attention (GLA)."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import gated_linear_attention, gated_linear_attention_step
from ..kernels.runtime.backend import compute_dtype
from .mixer import Cache, CacheSpec, TokenMixer, head_size, is_step, positive, store


class UniformBiasLinear(nn.Linear):
    """A linear map whose bias starts uniform in ``bias_range``."""

    def __init__(self, in_features: int, out_features: int, bias_range: Sequence[float]):
        self.bias_range = bias_range
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        low, high = self.bias_range
        nn.init.uniform_(self.bias, low, high)


class GatedLinearAttention(TokenMixer):
    """Linear attention whose state decays per channel by a gate of the token, with an output gate and per-head norm.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), section 4.4.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / 2 / num_heads by default (the paper's expand_k of 0.5).
        value_dim: V, per head; hidden_size / num_heads by default (expand_v of 1).
        gate_rank: inner dimension of the low-rank gate projection.
        gate_normalizer: the log-decay is ``logsigmoid(gate) / gate_normalizer``.
        gate_bias_range: the gate's bias starts uniform between these; at zero by default.
        norm_eps: of the output norm.
        backend: of the operator.

    The cache holds the fp32 state [N,H,K,V].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_bias_range: Sequence[float] | None = None,
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ):
        super().__init__()
        if not gate_normalizer > 0:
            raise ValueError(f"gate_normalizer: expected a positive number, got {gate_normalizer!r}")
        self.num_heads, self.backend = positive("num_heads", num_heads), backend
        self.key_dim = head_size(hidden_size, 2 * num_heads) if key_dim is None else positive("key_dim", key_dim)
        self.value_dim = head_size(hidden_size, num_heads) if value_dim is None else positive("value_dim", value_dim)
        self.gate_normalizer = gate_normalizer
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, positive("gate_rank", gate_rank), bias=False),
            UniformBiasLinear(gate_rank, keys, gate_bias_range or (0.0, 0.0)),
        )
        self.g_norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        return {"state": ((batch_size, self.num_heads, self.key_dim, self.value_dim), torch.float32)}

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        gate = self.gk_proj(hidden_states)
        g = F.logsigmoid(gate.to(compute_dtype(gate))) / self.gate_normalizer
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v, g = (rearrange(x, "b t (h d) -> b t h d", h=self.num_heads) for x in (q, k, v, g))
        state = cache.get("state") if cache is not None else None
        if state is not None and is_step(hidden_states, cu_seqlens):
            o = gated_linear_attention_step(q, k, v, g, state, backend=self.backend)
        else:
            o, state = gated_linear_attention(
                q,
                k,
                v,
                g,
                initial_state=state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
            if cache is not None and state is not None:
                store(cache, "state", state)
        o = self.g_norm(o.to(self.g_norm.weight.dtype))  # under autocast the two differ, and mixed norms are slow
        o = rearrange(o, "b t h d -> b t (h d)") * F.silu(self.g_proj(hidden_states))
        return self.o_proj(o)
