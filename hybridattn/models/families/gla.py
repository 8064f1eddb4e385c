"""Configuration of GLA models in flash-linear-attention's checkpoint format, which both libraries read and write."""

from collections.abc import Iterable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.configuration import HybridAttnConfig
from ..decoder.mixer_list import Entry, LayerMixer, shared_options

# Fields of flash-linear-attention's files that change the model's function, and the values that this library supports.
EXPECTED = {
    "feature_map": (None,),
    "use_gk": (True,),
    "use_gv": (False,),
    "use_output_gate": (True,),
    "elementwise_affine": (True,),
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
}
# Fields that only select an implementation in flash-linear-attention.
IGNORED = (*("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),)
# Fields of HybridAttnConfig that follow from fields of this class or that its files cannot store, and their defaults.
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
        ValueError: a value is not supported (see ``EXPECTED``), or this format cannot store a field of
            HybridAttnConfig (see ``DERIVED``).
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
                raise ValueError(f"{name}: expected {default!r} in a GLA model, got {got!r}; use HybridAttnConfig")
        if self.num_heads <= 0:
            raise ValueError(f"num_heads: expected a positive integer, got {self.num_heads}")
        if self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(f"num_kv_heads: expected None or num_heads {self.num_heads}, got {self.num_kv_heads}")
        if self.intermediate_size is None:
            inner = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = -(-inner // 256) * 256
        if self.num_hidden_layers is None:
            self.num_hidden_layers = type(self).num_hidden_layers
        self.rms_norm_eps = self.norm_eps
        self.mixers, self.mixer_options = self._mixers()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        derived = (*self._mixers(), self.norm_eps)
        for name, expected in zip(("mixers", "mixer_options", "rms_norm_eps"), derived, strict=True):
            if (got := getattr(self, name)) != expected:
                raise ValueError(
                    f"{name}: expected {expected}, which follows from the fields of a GLA model, got {got}"
                )
        super().check()

    def _mixers(self) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
        """Return ``mixers`` and ``mixer_options`` of these fields."""
        layers = [LayerMixer("gla", self._gated())] * (self.num_hidden_layers or 0)
        softmax: set[int] = set()
        for attn in self.attn if isinstance(self.attn, list) else [self.attn] if self.attn else []:
            for layer in self._attention_layers(attn):
                if layer in softmax:
                    raise ValueError(f"attn: expected each layer once, got layer {layer} again")
                softmax.add(layer)
                layers[layer] = self._softmax(attn)
        return shared_options(layers)

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
        if (
            not isinstance(attn, dict)
            or set(attn) - known
            or not {"layers", "num_heads"} <= set(attn)
            or attn.get("qkv_bias")
        ):
            raise ValueError(
                f"attn: expected layers, num_heads and options of {sorted(known)} without bias, got {attn}"
            )
        layers, last = attn["layers"], (self.num_hidden_layers or 0) - 1
        if not isinstance(layers, list | tuple) or not all(
            type(layer) is int and 0 <= layer <= last for layer in layers
        ):
            raise ValueError(f"attn: expected layers from 0 to {last}, got {layers}")
        return list(layers)

    def _softmax(self, attn: dict[str, Any]) -> LayerMixer:
        options = {
            "num_heads": attn["num_heads"],
            "num_key_value_heads": attn.get("num_kv_heads"),
            "rope_theta": attn.get("rope_theta", 10000.0),
        }
        window = attn.get("window_size")
        return LayerMixer("full", options) if window is None else LayerMixer("window", {**options, "window": window})

    def to_dict(self) -> dict[str, Any]:
        """Omit the fields of ``DERIVED``, which the format does not have."""
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED}


def _per_head(name: str, size: float, heads: int) -> int:
    """Divide a dimension by the number of heads; ``name`` is the field in the error."""
    if size <= 0 or size % heads:
        raise ValueError(f"{name}: expected a dimension divisible by {heads} heads, got {size:g}")
    return int(size) // heads
