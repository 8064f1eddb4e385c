"""Gated linear attention (GLA)."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.runtime.backend import compute_dtype
from .decayed_linear_attention import DecayedLinearAttention
from .mixer import head_size, positive


class UniformBiasLinear(nn.Linear):
    """A linear map whose bias starts uniform in ``bias_range``."""

    def __init__(self, in_features: int, out_features: int, bias_range: Sequence[float]):
        self.bias_range = bias_range
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        low, high = self.bias_range
        nn.init.uniform_(self.bias, low, high)


class GatedLinearAttention(DecayedLinearAttention):
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
        if not gate_normalizer > 0:
            raise ValueError(f"gate_normalizer: expected a positive number, got {gate_normalizer!r}")
        key_dim = head_size(hidden_size, 2 * positive("num_heads", num_heads)) if key_dim is None else key_dim
        value_dim = head_size(hidden_size, num_heads) if value_dim is None else value_dim
        super().__init__(hidden_size, num_heads, key_dim, value_dim, backend=backend)
        self.gate_normalizer = gate_normalizer
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, positive("gate_rank", gate_rank), bias=False),
            UniformBiasLinear(gate_rank, num_heads * key_dim, gate_bias_range or (0.0, 0.0)),
        )
        self.g_norm = nn.RMSNorm(value_dim, eps=norm_eps)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        gate = self.gk_proj(hidden_states)
        g = F.logsigmoid(gate.to(compute_dtype(gate))) / self.gate_normalizer
        return rearrange(g, "b t (h d) -> b t h d", h=self.num_heads)
