"""Linear attention layer with an elementwise feature map and without decay."""

from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.linear_attention import linear_attention, linear_attention_step
from .mixer import Cache, check_positive, head_size
from .recurrent import RecurrentMixer

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


class LinearAttention(RecurrentMixer):
    """Causal linear attention: ``o_t = phi(q_t) sum_{s<=t} phi(k_s)^T v_s``, by default normalised.

    The normalised output is divided by ``phi(q_t) sum_{s<=t} phi(k_s)^T``.

    Katharopoulos et al., "Transformers are RNNs" (2020), section 3, with phi(x) = elu(x) + 1.

    Args:
        hidden_size: model dimension.
        num_heads: H.
        key_dim: K, per head; hidden_size / num_heads by default.
        value_dim: V, per head; hidden_size / num_heads by default.
        feature_map: phi, ``"elu"`` (elu + 1), ``"relu"`` or ``"identity"``.
        normalize: divide by the sum of the weights. If False, the output is scaled by K^-0.5 instead.
        backend: backend of the operator.

    The cache holds the state [N,H,K,V] and, if ``normalize``, the sum of keys [N,H,K].
    """

    attend = staticmethod(linear_attention)
    step = staticmethod(linear_attention_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "elu",
        normalize: bool = True,
        backend: str | None = None,
    ):
        super().__init__(hidden_size)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected one of {sorted(FEATURE_MAPS)}, got {feature_map!r}")
        self.num_heads, self.normalize, self.backend = check_positive("num_heads", num_heads), normalize, backend
        self.key_dim = head_size(hidden_size, num_heads) if key_dim is None else check_positive("key_dim", key_dim)
        self.value_dim = (
            head_size(hidden_size, num_heads) if value_dim is None else check_positive("value_dim", value_dim)
        )
        self.state_heads, self.state_dim = num_heads, self.key_dim
        self.feature_map = feature_map
        self.q_proj = nn.Linear(hidden_size, num_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * self.value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.value_dim, hidden_size, bias=False)

    @property
    def operator_options(self) -> dict[str, Any]:
        return {"normalize": self.normalize, "backend": self.backend}

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        return self._mix(hidden_states, cu_seqlens, cache)

    def _mix(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
        attend: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Run the layer, with ``attend`` instead of the class's operator if it is given."""
        self.check_call(hidden_states, cu_seqlens, cache=cache)
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rearrange(phi(x), "b t (h d) -> b t h d", d=self.key_dim) for x in (q, k))
        v = rearrange(v, "b t (h d) -> b t h d", d=self.value_dim)
        o = self.recur((q, k, v), hidden_states, cu_seqlens, cache, attend)
        return self.o_proj(rearrange(o, "b t h d -> b t (h d)"))
