"""Gated linear attention (GLA), with a decay gate per key channel or per head."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.runtime.backend import compute_dtype
from .decays import HeadDecay
from .mixer import check_positive, head_size
from .projected_recurrent import ProjectedRecurrentMixer


class UniformBiasLinear(nn.Linear):
    """Linear map with a bias that is initialised uniformly in ``bias_range``."""

    def __init__(self, in_features: int, out_features: int, bias_range: Sequence[float]):
        self.bias_range = bias_range
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        low, high = self.bias_range
        nn.init.uniform_(self.bias, low, high)


class GatedLinearAttention(ProjectedRecurrentMixer):
    """Linear attention with a decay computed from each token, an output gate and a norm per head.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), section 4.4.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / 2 / num_heads by default (the paper's expand_k of 0.5).
        value_dim: V, per head; hidden_size / num_heads by default (the paper's expand_v of 1).
        gate_per: ``"channel"`` for the paper's gate per key channel, ``"head"`` for Mamba-2's (see ``HeadDecay``).
        gate_rank: inner dimension of the gate's low-rank projection. Only with ``gate_per="channel"``.
        gate_normalizer: the log-decay is ``logsigmoid(gate) / gate_normalizer``. Only with ``gate_per="channel"``.
        gate_bias_range: (low, high) of the uniform initial bias of the gate; zero by default. Only with
            ``gate_per="channel"``.
        gate_min: lower limit of the log-decay, at most 0; None for no limit.
        conv_size: taps of short convolutions of q, k and v, each followed by silu; None for no convolutions.
        rope_theta: base of the rotary frequencies of q and k; None, as in the paper, for no rotary positions.
        norm_eps: epsilon of the output norm.
        backend: backend of the operator.

    The cache holds the state [N,H,K,V] and the last inputs of the convolutions. With rotary positions it also holds
    the number of tokens per sequence [N].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_per: str = "channel",
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_bias_range: Sequence[float] | None = None,
        gate_min: float | None = None,
        conv_size: int | None = None,
        rope_theta: float | None = None,
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ):
        if gate_per not in ("channel", "head"):
            raise ValueError(f"gate_per: expected 'channel' or 'head', got {gate_per!r}")
        if not gate_normalizer > 0:
            raise ValueError(f"gate_normalizer: expected a positive number, got {gate_normalizer!r}")
        if gate_bias_range is not None and (len(gate_bias_range) != 2 or not gate_bias_range[0] <= gate_bias_range[1]):
            raise ValueError(f"gate_bias_range: expected two numbers (low, high) or None, got {gate_bias_range!r}")
        if gate_min is not None and not gate_min <= 0:
            raise ValueError(f"gate_min: expected a number of at most 0 or None, got {gate_min!r}")
        key_dim = head_size(hidden_size, num_heads, 2) if key_dim is None else key_dim
        value_dim = head_size(hidden_size, num_heads) if value_dim is None else value_dim
        super().__init__(hidden_size, num_heads, key_dim, value_dim, rope_theta, backend, conv_size)
        self.gate_per, self.gate_normalizer, self.gate_min = gate_per, gate_normalizer, gate_min
        if gate_per == "head":
            self.gk_proj = HeadDecay(hidden_size, num_heads)
        else:
            self.decays = key_dim
            self.gk_proj = nn.Sequential()
            self.gk_proj.down = nn.Linear(hidden_size, check_positive("gate_rank", gate_rank), bias=False)
            self.gk_proj.up = UniformBiasLinear(gate_rank, num_heads * key_dim, gate_bias_range or (0.0, 0.0))
        self.g_norm = nn.RMSNorm(value_dim, eps=norm_eps)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        g = self.gk_proj(hidden_states)
        if self.gate_per == "channel":
            g = F.logsigmoid(g.to(compute_dtype(g))) / self.gate_normalizer
            g = rearrange(g, "b t (h d) -> b t h d", d=self.key_dim)
        return g if self.gate_min is None else g.clamp(min=self.gate_min)
