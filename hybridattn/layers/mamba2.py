"""The Mamba-2 layer: gated linear attention per head, with a step size per token."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import gated_linear_attention, gated_linear_attention_step
from ..kernels.runtime.backend import compute_dtype
from .decays import SoftplusDecay
from .mixer import Cache, CacheSpec, check_positive
from .recurrent import RecurrentMixer
from .short_convolution import ShortConvolution


class Mamba2(RecurrentMixer):
    """State-space duality: ``S_t = exp(A dt_t) S_{t-1} + B_t^T dt_t x_t``, ``y_t = C_t S_t + D x_t``, gated and normed.

    Dao and Gu, "Transformers are SSMs" (2024), sections 6 and 7.1. It is gated linear attention of q = C, k = B and
    v = dt x with the log-decay A dt per head, A = -exp(A_log), dt = softplus(W x + dt_bias).

    Args:
        hidden_size: model dimension.
        num_heads: H; 2 hidden_size / head_dim by default.
        head_dim: V, per head.
        state_size: K, per group.
        num_groups: groups of heads that share B and C; also the groups of the output norm.
        conv_size: taps of the short convolution of x, B and C, followed by silu.
        conv_bias: bias of this convolution.
        bias: biases of the input and output projections.
        dt_limit: (low, high) to which dt is clamped.
        norm_eps: epsilon of the output norm.
        backend: backend of the operator.

    The cache holds the state [N,H,K,V] and the last inputs of the convolution.
    """

    attend = staticmethod(gated_linear_attention)
    step = staticmethod(gated_linear_attention_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        dt_limit: Sequence[float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ):
        super().__init__(hidden_size)
        self.value_dim, self.state_dim = check_positive("head_dim", head_dim), check_positive("state_size", state_size)
        if num_heads is None and 2 * hidden_size % head_dim:
            raise ValueError(f"head_dim: expected a divisor of 2 hidden_size = {2 * hidden_size}, got {head_dim}")
        self.state_heads = 2 * hidden_size // head_dim if num_heads is None else check_positive("num_heads", num_heads)
        self.num_groups, self.backend = check_positive("num_groups", num_groups), backend
        if self.state_heads % num_groups:
            raise ValueError(f"num_groups: expected a divisor of num_heads {self.state_heads}, got {num_groups}")
        if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit: expected two numbers (low, high) of at least 0, got {dt_limit!r}")
        self.dt_limit = tuple(dt_limit)
        inner, shared = self.state_heads * head_dim, num_groups * state_size
        self.sizes = [inner, inner + 2 * shared, self.state_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=bias)
        self.conv = ShortConvolution(self.sizes[1], conv_size, activation="silu", bias=conv_bias)
        self.decay = SoftplusDecay(self.state_heads, self.state_heads, (1.0, 16.0))
        self.D = nn.Parameter(torch.ones(self.state_heads))
        self.norm = nn.RMSNorm(inner // num_groups, eps=norm_eps, elementwise_affine=False)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)

    @property
    def operator_options(self) -> dict[str, Any]:
        return {"scale": 1.0, "backend": self.backend}

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        return super().cache_spec(batch_size, tokens, dtype) | self.conv.cache_spec(batch_size, tokens, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        self.check_call(hidden_states, cu_seqlens, position_ids, cache)
        z, xbc, dt = self.in_proj(hidden_states).split(self.sizes, -1)
        shared = self.num_groups * self.state_dim
        x, k, q = self.conv(xbc, cu_seqlens=cu_seqlens, cache=cache).split([self.sizes[0], shared, shared], -1)
        q, k = (rearrange(y, "b t (g k) -> b t g k", g=self.num_groups) for y in (q, k))
        x = rearrange(x, "b t (h v) -> b t h v", h=self.state_heads)
        dtype = compute_dtype(dt)
        dt = F.softplus(dt.to(dtype) + self.decay.dt_bias.to(dtype)).clamp(*self.dt_limit)
        g = -self.decay.A_log.to(dtype).exp() * dt
        y = self.recur((q, k, x * dt[..., None], g), hidden_states, cu_seqlens, cache)
        y = rearrange(y + self.D.to(dtype)[:, None] * x, "b t h v -> b t (h v)") * F.silu(z.to(dtype))
        y = self.norm(rearrange(y, "b t (g d) -> b t g d", g=self.num_groups))
        return self.out_proj((rearrange(y, "b t g d -> b t (g d)") * self.norm_weight).to(hidden_states.dtype))
