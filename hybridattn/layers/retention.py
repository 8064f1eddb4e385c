"""Multi-scale retention, the linear attention layer of RetNet."""

from collections.abc import Sequence

from torch import Tensor, nn

from .mixer import head_size
from .projected_recurrent import ProjectedRecurrentMixer
from .slopes import Slopes, decay_slopes


class Retention(ProjectedRecurrentMixer):
    """Multi-scale retention: a constant decay per head, rotary positions, group norm and swish gate.

    Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (2023), sections 2.1 and 2.2.
    The group norm of equation 8 normalises each head's values, here without affine parameters. The operator's scale is
    the paper's factor K^-0.5 of k. The layer omits the published row and score normalisations, which the group norm
    cancels (section 2.2).

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head, even; hidden_size / num_heads by default.
        value_dim: V, per head; 2 hidden_size / num_heads by default (section 3.1).
        slopes: a convention of ``decay_slopes``, or H numbers of at least 0; a head's log-decay is minus its slope.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        norm_eps: epsilon of the output norm.
        backend: backend of the operator.

    The cache holds the state [N,H,K,V]. With rotary positions it also holds the number of tokens per sequence [N].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        slopes: str | Sequence[float] = "retnet",
        rope_theta: float | None = 10000.0,
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ):
        key_dim = head_size(hidden_size, num_heads) if key_dim is None else key_dim
        value_dim = 2 * head_size(hidden_size, num_heads) if value_dim is None else value_dim
        super().__init__(hidden_size, num_heads, key_dim, value_dim, rope_theta, backend)
        self.slopes = Slopes(decay_slopes(slopes, num_heads) if isinstance(slopes, str) else slopes, num_heads)
        self.g_norm = nn.LayerNorm(value_dim, eps=norm_eps, elementwise_affine=False)

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        return -self.slopes()
