"""BASED's linear attention layer, with a second-order Taylor approximation of softmax."""

from torch import Tensor

from ..kernels.linear_attention import features, taylor_linear_attention, taylor_linear_attention_step
from ..kernels.runtime.backend import compute_dtype
from .linear_attention import LinearAttention


class TaylorLinearAttention(LinearAttention):
    """Linear attention whose weights are the second-order Taylor series of softmax attention's exponential.

    Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (BASED, 2024),
    section 4.1. The layer has no rotary positions, decay or gate. It normalises the weights and has one output
    projection.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: d' of the paper, per head. The state has P = 1 + d' + d' (d' + 1) / 2 packed features.
        value_dim: V, per head; hidden_size / num_heads by default.
        backend: backend of the operator.

    The cache holds the state [N,H,P,V] and the sum of the features [N,H,P].
    """

    attend = staticmethod(taylor_linear_attention)
    step = staticmethod(taylor_linear_attention_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 1,
        key_dim: int = 16,
        value_dim: int | None = None,
        backend: str | None = None,
    ):
        super().__init__(hidden_size, num_heads, key_dim, value_dim, feature_map="identity", backend=backend)
        self.state_dim = features.count(self.key_dim)

    def state_keys(self, k: Tensor) -> Tensor:
        """Return the Taylor features of the keys, scaled as in the operator."""
        return features.taylor(k.to(compute_dtype(k)) * self.key_dim**-0.25)
