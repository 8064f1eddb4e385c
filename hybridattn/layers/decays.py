"""Decays that are computed from each token with Mamba-2's parameters, per head or per channel."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.runtime.backend import compute_dtype
from .mixer import check_positive


class SoftplusDecay(nn.Module):
    """Parameters of ``-exp(A_log) * softplus(x + dt_bias)``, a log-decay of which A_log has one number per head.

    As in Mamba-2's code, the initial exp(A_log) is uniform and the initial softplus(dt_bias) log-uniform in 0.001 to
    0.1.

    Args:
        num_heads: H, length of A_log.
        size: length of dt_bias.
        a_range: (low, high) of the initial exp(A_log).
    """

    def __init__(self, num_heads: int, size: int, a_range: tuple[float, float]):
        super().__init__()
        self.a_range = a_range
        self.dt_bias = nn.Parameter(torch.empty(size))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        with torch.no_grad():
            for parameter, value in self.initial_values():
                parameter.copy_(value)

    def initial_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, initial value) for ``dt_bias`` and ``A_log``."""
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        return [
            (self.dt_bias, dt.expm1().log()),
            (self.A_log, torch.empty_like(self.A_log).uniform_(*self.a_range).log()),
        ]


class HeadDecay(SoftplusDecay):
    """Compute Mamba-2's log-decay per token and head: ``-exp(A_log) * softplus(W x + dt_bias)``.

    It maps [B,T,D] to [B,T,H], in fp32 or fp64. Dao and Gu, "Transformers are SSMs" (2024), section 7.
    """

    def __init__(self, hidden_size: int, num_heads: int, a_range: tuple[float, float] = (1.0, 16.0)):
        super().__init__(num_heads, num_heads, a_range)
        self.dt_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        dt = self.dt_proj(hidden_states)
        dtype = compute_dtype(dt)
        return -self.A_log.to(dtype).exp() * F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))


class ChannelDecay(SoftplusDecay):
    """Compute Kimi Delta Attention's log-decay per token and key channel, from a low-rank projection f.

    It maps [B,T,D] to [B,T,H,K], in fp32 or fp64: ``-exp(A_log) * softplus(f(x) + dt_bias)``; with a lower bound,
    ``lower_bound * sigmoid(exp(A_log) * (f(x) + dt_bias))``. Kimi Team, "Kimi Linear" (2025), section 4.

    Args:
        hidden_size: D.
        num_heads, key_dim: H and K.
        rank: inner dimension of the projection.
        lower_bound: limit of the log-decay, below 0; None for no limit.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_dim: int, rank: int, lower_bound: float | None = None):
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound: expected a negative number or None, got {lower_bound!r}")
        super().__init__(num_heads, num_heads * key_dim, (1.0, 16.0) if lower_bound is None else (1.0, 1.0))
        self.key_dim, self.lower_bound = key_dim, lower_bound
        self.down = nn.Linear(hidden_size, check_positive("rank", rank), bias=False)
        self.up = nn.Linear(rank, num_heads * key_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.up(self.down(hidden_states))
        dtype = compute_dtype(x)
        x = rearrange(x.to(dtype) + self.dt_bias.to(dtype), "b t (h k) -> b t h k", k=self.key_dim)
        rate = self.A_log.to(dtype).exp()[:, None]
        return -rate * F.softplus(x) if self.lower_bound is None else self.lower_bound * (rate * x).sigmoid()
