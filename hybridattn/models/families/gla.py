"""The configuration of flash-linear-attention's GLA models, so that their checkpoints open as they are."""

from collections.abc import Iterable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.configuration import HybridAttnConfig
from ..decoder.mixer_list import LayerMixer, shared_options

# Fields of flash-linear-attention's files that would change the function, and the values that this library supports.
EXPECTED = {
    "feature_map": (None,),
    "use_gk": (True,),
    "use_gv": (False,),
    "use_output_gate": (True,),
    "elementwise_affine": (True,),
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
}
# Fields that only choose between implementations there.
IGNORED = (*("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),)
# Fields of HybridAttnConfig that follow from fields of this class or that its files cannot store; their defaults.
DERIVED = {
    "mixers": None,
    "mixer_options": {},
    "mixer_aliases": {},
    "mlp": "swiglu",
    "input_conv_size": None,
    "rms_norm_eps": 1e-6,
}


@strict
class HybridAttnGLAConfig(HybridAttnConfig):
    """GLA models of flash-linear-attention: its fields in ``config.json``, its names of weights in the files.

    Either library opens what the other has saved. ``mixers``, ``mixer_options`` and the like follow from these fields.
    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024).

    Args:
        num_heads: H of the gated layers.
        num_kv_heads: None or num_heads.
        expand_k, expand_v: key and value dimension of all heads together, over hidden_size.
        hidden_ratio: where intermediate_size is None, it is 2/3 of hidden_ratio * hidden_size, up to a multiple of 256.
        use_short_conv, conv_size: short convolutions of q, k and v, with so many taps.
        clamp_min: least log-decay of a gate, None for no limit.
        attn: softmax attention instead in some layers: ``{"layers": [..], "num_heads": .., "num_kv_heads": ..,
            "window_size": .., "rope_theta": ..}``; or a list of these.
        norm_eps: of every norm.

    Raises:
        ValueError: a field that changes the function and that this library has nothing for (see ``EXPECTED``), or a
            field of HybridAttnConfig that these files cannot keep (see ``DERIVED``).
    """

    model_type = "gla"
    model_classes: ClassVar[str] = "hybridattn.models.families.modeling"

    hidden_size: int = 2048
    num_hidden_layers: int | None = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: int | float | None = 4
    use_short_conv: bool = False
    conv_size: int = 4
    clamp_min: float | int | None = None
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        for name, expected in EXPECTED.items():
            if kwargs.get(name, expected[0]) not in expected:
                raise ValueError(f"{name}: expected {expected[0]!r} in a GLA model, got {kwargs[name]!r}")
        for name, default in DERIVED.items():
            if (got := getattr(self, name)) != default:
                raise ValueError(f"{name}: expected none in a GLA model (HybridAttnConfig has it), got {got!r}")
        if self.num_heads <= 0:
            raise ValueError(f"num_heads: expected a positive integer, got {self.num_heads}")
        if self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(f"num_kv_heads: expected None or num_heads {self.num_heads}, got {self.num_kv_heads}")
        if self.intermediate_size is None:
            inner = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = -(-inner // 256) * 256
        self.rms_norm_eps = self.norm_eps
        layers = [LayerMixer("gla", self._gated())] * (self.num_hidden_layers or 0)
        for attn in self.attn if isinstance(self.attn, list) else [self.attn] if self.attn else []:
            for layer in self._attention_layers(attn):
                layers[layer] = self._softmax(attn)
        self.mixers, self.mixer_options = shared_options(layers)
        super().__post_init__(**kwargs)

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        return [name for name in super().unknown_fields(names) if name not in EXPECTED and name not in IGNORED]

    def _gated(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "key_dim": _per_head("expand_k", self.hidden_size * self.expand_k, self.num_heads),
            "value_dim": _per_head("expand_v", self.hidden_size * self.expand_v, self.num_heads),
            "gate_min": self.clamp_min,
            "conv_size": self.conv_size if self.use_short_conv else None,
            "norm_eps": self.norm_eps,
        }

    def _attention_layers(self, attn: dict[str, Any]) -> list[int]:
        known = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}
        if set(attn) - known or not {"layers", "num_heads"} <= set(attn) or attn.get("qkv_bias"):
            raise ValueError(f"attn: expected layers, num_heads and others of {sorted(known)} without bias, got {attn}")
        layers, last = list(attn["layers"]), (self.num_hidden_layers or 0) - 1
        if not all(isinstance(layer, int) and 0 <= layer <= last for layer in layers):
            raise ValueError(f"attn: expected layers from 0 to {last}, got {layers}")
        return layers

    def _softmax(self, attn: dict[str, Any]) -> LayerMixer:
        options = {
            "num_heads": attn["num_heads"],
            "num_key_value_heads": attn.get("num_kv_heads"),
            "rope_theta": attn.get("rope_theta", 10000.0),
        }
        window = attn.get("window_size")
        return LayerMixer("full", options) if window is None else LayerMixer("window", {**options, "window": window})

    def to_dict(self) -> dict[str, Any]:
        """Leave out the fields that follow from those of this class."""
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED}


def _per_head(name: str, size: float, heads: int) -> int:
    if size <= 0 or size % heads:
        raise ValueError(f"{name}: expected a dimension that {heads} heads share evenly, got {size:g}")
    return int(size) // heads
