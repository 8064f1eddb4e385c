"""Configuration of GLA models in flash-linear-attention's checkpoint format."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.mixer_list import LayerMixer
from .fla import EXPECTED, FLAConfig, per_head


@strict
class HybridAttnGLAConfig(FLAConfig):
    """Configuration of GLA models with the fields and weight names of flash-linear-attention.

    Each library opens checkpoints of the other. ``mixers``, ``mixer_options`` and ``rms_norm_eps`` follow
    from the fields below.
    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024).

    Args:
        num_heads: number of heads of the GLA layers.
        num_kv_heads: None or num_heads.
        expand_k: key dimension of all heads together, divided by hidden_size.
        expand_v: value dimension of all heads together, divided by hidden_size.
        hidden_ratio: if intermediate_size is None, it becomes 2/3 * hidden_ratio * hidden_size, rounded up to a
            multiple of 256.
        use_short_conv: apply short convolutions to q, k and v.
        conv_size: number of taps of the short convolutions.
        clamp_min: lower limit of the log-decay; None for no limit.
        attn: layers with softmax attention instead of GLA: ``{"layers": [..], "num_heads": .., "num_kv_heads": ..,
            "window_size": .., "rope_theta": ..}``, or a list of such objects.
        norm_eps: epsilon of every norm.

    Raises:
        ValueError: a value is not supported (see ``expected``), or this format cannot store a field of
            HybridAttnConfig (``mixers``, ``mixer_options``, ``mixer_aliases``, ``mlp``, ``input_conv_size``,
            ``rms_norm_eps``).
    """

    model_type = "gla"
    expected: ClassVar[dict[str, tuple[Any, ...]]] = {
        **EXPECTED,
        "feature_map": (None,),
        "use_gk": (True,),
        "use_gv": (False,),
        "use_output_gate": (True,),
        "elementwise_affine": (True,),
    }

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float | int = 0.5
    expand_v: float | int = 1.0
    use_short_conv: bool = False
    clamp_min: float | int | None = None

    def linear_mixer(self) -> LayerMixer:
        if self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(f"num_kv_heads: expected None or num_heads {self.num_heads}, got {self.num_kv_heads}")
        options = {
            "num_heads": self.num_heads,
            "key_dim": per_head("expand_k", self.hidden_size * self.expand_k, self.num_heads),
            "value_dim": per_head("expand_v", self.hidden_size * self.expand_v, self.num_heads),
            "gate_min": self.clamp_min,
            "conv_size": self.conv_size if self.use_short_conv else None,
            "norm_eps": self.norm_eps,
        }
        return LayerMixer("gla", options)
