"""Delta-rule layers: DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import gated_delta_rule, gated_delta_rule_step
from ..kernels.linear_attention.operands import l2_normalize
from ..kernels.runtime.backend import compute_dtype
from .decays import ChannelDecay, HeadDecay
from .mixer import head_size
from .projected_recurrent import ProjectedRecurrentMixer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


class DeltaNet(ProjectedRecurrentMixer):
    """Linear attention that replaces the value stored for a key instead of adding to it, without decay.

    Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024), sections 2.2 and
    3.3: short convolutions, silu, L2 norms of q and k, sigmoid strength of writing, a norm per head.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / num_heads by default.
        value_dim: V, per head; hidden_size / num_heads by default.
        output_gate: multiply the normed output by ``silu(W_g x)``.
        allow_neg_eigval: strength of writing 0 to 2 instead of 0 to 1, so that the state can change its sign. Grazzi
            et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (2024), section 4.
        conv_size: taps of short convolutions of q, k and v, each followed by its activation; None for the activations
            alone.
        norm_eps: epsilon of the output norm.
        backend: backend of the operator.
        num_value_heads: H, heads of v and of the state, a multiple of num_heads; num_heads by default.
        qk_activation: activation of q and k before their L2 norms: ``"silu"``, ``"relu"``, ``"elu"`` (elu + 1) or
            ``"identity"``. The activation of v is silu.

    The cache holds the state [N,H,K,V] and the last inputs of the convolutions.
    """

    attend = staticmethod(gated_delta_rule)
    step = staticmethod(gated_delta_rule_step)
    state_products = 3

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        output_gate: bool = False,
        allow_neg_eigval: bool = False,
        conv_size: int | None = 4,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        num_value_heads: int | None = None,
        qk_activation: str = "silu",
    ):
        if qk_activation not in ACTIVATIONS:
            raise ValueError(f"qk_activation: expected one of {sorted(ACTIVATIONS)}, got {qk_activation!r}")
        key_dim = head_size(hidden_size, num_heads) if key_dim is None else key_dim
        value_dim = head_size(hidden_size, num_heads) if value_dim is None else value_dim
        super().__init__(hidden_size, num_heads, key_dim, value_dim, None, backend, conv_size, num_value_heads)
        self.allow_neg_eigval, self.decays, self.qk_activation = allow_neg_eigval, key_dim * key_dim, qk_activation
        for conv in (self.q_conv, self.k_conv):
            if conv is not None and qk_activation != "silu":
                conv.activation = None
        self.b_proj = nn.Linear(hidden_size, self.state_heads, bias=False)
        if not output_gate:
            self.g_proj = None
        self.g_norm = nn.RMSNorm(value_dim, eps=norm_eps)

    @property
    def operator_options(self) -> dict[str, Any]:
        return {"normalize_qk": True, "backend": self.backend}

    def activation(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the activations that no convolution has applied."""
        if self.q_conv is None or self.qk_activation != "silu":
            q, k = (ACTIVATIONS[self.qk_activation](x) for x in (q, k))
        return q, k, F.silu(v) if self.v_conv is None else v

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        return None

    def gates(self, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
        """Return the log-decay and the strength of writing [B,T,H], 0 to 1 or 0 to 2."""
        strength = self.b_proj(hidden_states)
        strength = strength.to(compute_dtype(strength)).sigmoid()
        return self.log_decay(hidden_states), 2 * strength if self.allow_neg_eigval else strength

    def state_keys(self, k: Tensor) -> Tensor:
        return l2_normalize(k.to(compute_dtype(k)))


class GatedDeltaNet(DeltaNet):
    """``DeltaNet`` with Mamba-2's decay per head, and an output gate.

    Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2025), sections 3.1 and 3.4.

    Args:
        hidden_size: model dimension.
        num_heads: heads of q and k.
        key_dim: K, per head; 3/4 hidden_size / num_heads by default.
        value_dim: V, per head; 2 key_dim by default.
        output_gate: multiply the normed output by an activation of ``W_g x``.
        allow_neg_eigval, conv_size, norm_eps, backend, num_value_heads: as in ``DeltaNet``.
        gate_activation: activation of the output gate, ``"silu"`` or ``"sigmoid"``.

    The cache holds the state [N,H,K,V] and the last inputs of the convolutions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int | None = 4,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        num_value_heads: int | None = None,
        gate_activation: str = "silu",
    ):
        if gate_activation not in ("silu", "sigmoid"):
            raise ValueError(f"gate_activation: expected 'silu' or 'sigmoid', got {gate_activation!r}")
        key_dim = 3 * head_size(hidden_size, num_heads, 4) if key_dim is None else key_dim
        super().__init__(
            hidden_size,
            num_heads,
            key_dim,
            2 * key_dim if value_dim is None else value_dim,
            output_gate,
            allow_neg_eigval,
            conv_size,
            norm_eps,
            backend,
            num_value_heads,
        )
        self.gate = F.silu if gate_activation == "silu" else torch.sigmoid
        self.gk_proj = HeadDecay(hidden_size, self.state_heads, (0.0, 16.0))

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        return self.gk_proj(hidden_states)


class KimiDeltaAttention(DeltaNet):
    """``DeltaNet`` with a decay per key channel, and a low-rank sigmoid output gate.

    Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025), section 4.

    Args:
        hidden_size: model dimension.
        num_heads: heads of q and k.
        key_dim: K, per head; hidden_size / num_heads by default.
        value_dim: V, per head; key_dim by default. It is also the rank of the gates' projections.
        lower_bound: limit of the log-decay, below 0 (see ``ChannelDecay``); None for no limit.
        allow_neg_eigval, conv_size, norm_eps, backend, num_value_heads: as in ``DeltaNet``.

    The cache holds the state [N,H,K,V] and the last inputs of the convolutions.
    """

    gate = staticmethod(torch.sigmoid)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        conv_size: int | None = 4,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        num_value_heads: int | None = None,
    ):
        key_dim = head_size(hidden_size, num_heads) if key_dim is None else key_dim
        rank = key_dim if value_dim is None else value_dim
        super().__init__(
            hidden_size,
            num_heads,
            key_dim,
            rank,
            False,
            allow_neg_eigval,
            conv_size,
            norm_eps,
            backend,
            num_value_heads,
        )
        self.gk_proj = ChannelDecay(hidden_size, self.state_heads, key_dim, rank, lower_bound)
        self.g_proj = nn.Sequential()
        self.g_proj.down = nn.Linear(hidden_size, rank, bias=False)
        self.g_proj.up = nn.Linear(rank, self.state_heads * rank)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        return self.gk_proj(hidden_states)
