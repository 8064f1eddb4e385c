"""Configurations of DeltaNet, Gated DeltaNet and KDA models in flash-linear-attention's checkpoint format."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.mixer_list import LayerMixer
from .fla import EXPECTED, IGNORED, FLAConfig, per_head


@strict
class _DeltaConfig(FLAConfig):
    """Options that the layers of the three families share."""

    allow_neg_eigval: bool = False

    def _shared(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "allow_neg_eigval": self.allow_neg_eigval,
            "conv_size": self.conv_size if self.use_short_conv else None,
            "norm_eps": self.norm_eps,
        }


@strict
class HybridAttnDeltaNetConfig(_DeltaConfig):
    """Configuration of DeltaNet models with the fields and weight names of flash-linear-attention.

    Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024).

    Args:
        num_heads: number of heads of the DeltaNet layers.
        expand_k: key dimension of all heads together, divided by hidden_size.
        expand_v: value dimension of all heads together, divided by hidden_size.
        use_gate: multiply the normed output by ``silu(W_g x)``.
        qk_activation: activation of q and k before their L2 norm: ``"silu"``, ``"relu"``, ``"elu"`` (elu + 1) or
            ``"identity"``.
        allow_neg_eigval: strength of writing 0 to 2 instead of 0 to 1.
        use_short_conv, conv_size, hidden_ratio, attn, norm_eps: as in ``HybridAttnGLAConfig``.

    Raises:
        ValueError: as ``HybridAttnGLAConfig``.
    """

    model_type = "delta_net"
    expected: ClassVar[dict[str, tuple[Any, ...]]] = {**EXPECTED, "use_beta": (True,), "qk_norm": ("l2",)}
    ignored: ClassVar[tuple[str, ...]] = (*IGNORED, "use_output_norm")  # flash-linear-attention never reads it

    expand_k: float | int = 1.0
    expand_v: float | int = 1.0
    use_gate: bool = False
    qk_activation: str = "silu"

    def linear_mixer(self) -> LayerMixer:
        options = {
            **self._shared(),
            "key_dim": per_head("expand_k", self.hidden_size * self.expand_k, self.num_heads),
            "value_dim": per_head("expand_v", self.hidden_size * self.expand_v, self.num_heads),
            "output_gate": self.use_gate,
            "qk_activation": self.qk_activation,
        }
        return LayerMixer("delta", options)


@strict
class _GroupedDeltaConfig(_DeltaConfig):
    """Dimensions per head, and more heads of v than of q and k."""

    head_dim: int = 128
    expand_v: float | int = 1.0
    num_v_heads: int | None = None

    def _shared(self) -> dict[str, Any]:
        heads = self.num_heads if self.num_v_heads is None else self.num_v_heads
        if heads <= 0 or heads % self.num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads {self.num_heads}, got {self.num_v_heads}")
        return {
            **super()._shared(),
            "key_dim": self.head_dim,
            "value_dim": per_head("expand_v", heads * self.head_dim * self.expand_v, heads),
            "num_value_heads": self.num_v_heads,
        }


@strict
class HybridAttnGatedDeltaNetConfig(_GroupedDeltaConfig):
    """Configuration of Gated DeltaNet models with the fields and weight names of flash-linear-attention.

    Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2025).

    Args:
        num_heads: heads of q and k.
        head_dim: key dimension per head.
        expand_v: value dimension per head, divided by head_dim.
        num_v_heads: heads of v and of the state, a multiple of num_heads; num_heads by default.
        use_gate: multiply the normed output by an activation of ``W_g x``.
        output_gate_activation: this activation: ``"swish"`` (the same as ``"silu"``) or ``"sigmoid"``.
        allow_neg_eigval: strength of writing 0 to 2 instead of 0 to 1.
        use_short_conv, conv_size, hidden_ratio, attn, norm_eps: as in ``HybridAttnGLAConfig``.

    Raises:
        ValueError: as ``HybridAttnGLAConfig``.
    """

    model_type = "gated_deltanet"

    num_hidden_layers: int | None = 21
    num_heads: int = 6
    head_dim: int = 256
    expand_v: float | int = 2.0
    use_gate: bool = True
    output_gate_activation: str = "swish"

    def linear_mixer(self) -> LayerMixer:
        gate = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}.get(self.output_gate_activation)
        if gate is None:
            raise ValueError(
                f"output_gate_activation: expected 'swish', 'silu' or 'sigmoid', got {self.output_gate_activation!r}"
            )
        return LayerMixer("gated_delta", {**self._shared(), "output_gate": self.use_gate, "gate_activation": gate})


@strict
class HybridAttnKDAConfig(_GroupedDeltaConfig):
    """Configuration of Kimi Delta Attention models with the fields and weight names of flash-linear-attention.

    Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025).

    Args:
        num_heads: heads of q and k.
        head_dim: key dimension per head.
        expand_v: value dimension per head, divided by head_dim.
        num_v_heads: heads of v and of the state, a multiple of num_heads; num_heads by default.
        lower_bound: limit of the log-decay, below 0; None for no limit.
        safe_gate: whether flash-linear-attention's kernels rely on the limit, which must then be from -5 to 0.
        allow_neg_eigval: strength of writing 0 to 2 instead of 0 to 1.
        use_short_conv, conv_size, hidden_ratio, attn, norm_eps: as in ``HybridAttnGLAConfig``.

    Raises:
        ValueError: as ``HybridAttnGLAConfig``.
    """

    model_type = "kda"

    safe_gate: bool = False
    lower_bound: float | int | None = None

    def linear_mixer(self) -> LayerMixer:
        if self.safe_gate and (self.lower_bound is None or not -5 <= self.lower_bound < 0):
            raise ValueError(f"lower_bound: expected -5 to 0 with safe_gate, got {self.lower_bound}")
        return LayerMixer("kda", {**self._shared(), "lower_bound": self.lower_bound})
