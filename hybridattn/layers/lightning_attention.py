"""Lightning attention, the linear attention layer of TransNormerLLM and MiniMax-01."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixer import head_size
from .projected_recurrent import ProjectedRecurrentMixer
from .slopes import Slopes, decay_slopes


class LightningAttention(ProjectedRecurrentMixer):
    """Linear attention with a constant decay per head and layer, an output norm and a sigmoid gate.

    Qin et al., "TransNormerLLM" (2023), section 3. Activations and gate are those of Lightning Attention in
    "MiniMax-01" (2025), section 2.2: silu on q, k and v, and sigmoid on the output gate. The output norm is an RMSNorm
    over all heads together, without affine parameters. It cancels the operator's scale of K^-0.5.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / num_heads by default.
        value_dim: V, per head; hidden_size / num_heads by default.
        slopes: a convention of ``decay_slopes``, or H numbers of at least 0; a head's log-decay is minus its slope.
        layer_idx: index of this layer, from 0, for slopes that depend on it.
        num_layers: number of layers of the model, for slopes that depend on it.
        activate_values: apply silu to v too; the TransNormerLLM paper applies it to q and k alone.
        rope_theta: base of the rotary frequencies (LRPE-d, in TransNormerLLM's first layer); None for no rotary
            positions.
        norm_eps: epsilon of the output norm.
        backend: backend of the operator.

    The cache holds the state [N,H,K,V]. With rotary positions it also holds the number of tokens per sequence [N].
    """

    gate = staticmethod(torch.sigmoid)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        slopes: str | Sequence[float] = "transnormer",
        layer_idx: int = 0,
        num_layers: int = 1,
        activate_values: bool = True,
        rope_theta: float | None = None,
        norm_eps: float = 1e-6,
        backend: str | None = None,
    ):
        key_dim = head_size(hidden_size, num_heads) if key_dim is None else key_dim
        value_dim = head_size(hidden_size, num_heads) if value_dim is None else value_dim
        super().__init__(hidden_size, num_heads, key_dim, value_dim, rope_theta, backend)
        named = isinstance(slopes, str)
        self.slopes = Slopes(decay_slopes(slopes, num_heads, layer_idx, num_layers) if named else slopes, num_heads)
        self.activate_values = activate_values
        self.g_norm = nn.RMSNorm([num_heads, value_dim], eps=norm_eps, elementwise_affine=False)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        return -self.slopes()

    def activation(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), F.silu(k), F.silu(v) if self.activate_values else v
