"""Base class of configurations in flash-linear-attention's checkpoint format, which both libraries read and write."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.configuration import HybridAttnConfig
from ..decoder.mixer_list import Entry, LayerMixer, shared_options

# Fields of flash-linear-attention's files that change the model's function, and the values that this library supports.
# The first value is flash-linear-attention's default, since saved files omit these fields.
EXPECTED: dict[str, tuple[Any, ...]] = {"hidden_act": ("swish", "silu"), "attnres_block_size": (None,)}
# Fields that only select an implementation in flash-linear-attention.
IGNORED = (*("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),)
# Fields of HybridAttnConfig that follow from fields of these classes or that the files cannot store; their defaults.
DERIVED = {
    "mixers": None,
    "mixer_options": {},
    "mixer_aliases": {},
    "mlp": "swiglu",
    "input_conv_size": None,
    "rms_norm_eps": 1e-6,
}
ATTENTION = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}  # fields of ``attn``


@strict
class FLAConfig(HybridAttnConfig):
    """Fields that flash-linear-attention's configurations share, and the mixers that follow from a family's fields.

    A family defines ``linear_mixer`` and the fields that it reads.

    Attributes:
        expected: fields of flash-linear-attention that this class does not have, and the values that it supports.
        ignored: fields of flash-linear-attention that do not change the model's function.
    """

    model_classes: ClassVar[str] = "hybridattn.models.families.modeling"
    expected: ClassVar[dict[str, tuple[Any, ...]]] = EXPECTED
    ignored: ClassVar[tuple[str, ...]] = IGNORED

    hidden_size: int = 2048
    num_hidden_layers: int | None = 24
    num_heads: int = 16
    use_short_conv: bool = True
    conv_size: int = 4
    hidden_ratio: int | float | None = 4
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        for name, expected in self.expected.items():
            if kwargs.get(name, expected[0]) not in expected:
                raise ValueError(f"{name}: expected {expected[0]!r} in a {_family(self)} model, got {kwargs[name]!r}")
        for name, default in DERIVED.items():
            if (got := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}: expected {default!r} in a {_family(self)} model, got {got!r}; use HybridAttnConfig"
                )
        if self.num_heads <= 0:
            raise ValueError(f"num_heads: expected a positive integer, got {self.num_heads}")
        if self.intermediate_size is None:
            inner = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = -(-inner // 256) * 256
        if self.num_hidden_layers is None:
            self.num_hidden_layers = type(self).num_hidden_layers
        self.rms_norm_eps = self.norm_eps
        self.mixers, self.mixer_options = self._mixers()
        super().__post_init__(**kwargs)

    def linear_mixer(self) -> LayerMixer:
        """Return the mixer of the layers without softmax attention.

        Raises:
            ValueError: a field has a value that no mixer supports.
        """
        raise NotImplementedError

    def check(self) -> None:
        derived = (*self._mixers(), self.norm_eps)
        for name, expected in zip(("mixers", "mixer_options", "rms_norm_eps"), derived, strict=True):
            if (got := getattr(self, name)) != expected:
                raise ValueError(
                    f"{name}: expected {expected}, which follows from the fields of a {_family(self)} model, got {got}"
                )
        super().check()

    def _mixers(self) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
        """Return ``mixers`` and ``mixer_options`` of these fields."""
        layers = [self.linear_mixer()] * (self.num_hidden_layers or 0)
        softmax: set[int] = set()
        for attn in self.attn if isinstance(self.attn, list) else [self.attn] if self.attn else []:
            for layer in self._attention_layers(attn):
                if layer in softmax:
                    raise ValueError(f"attn: expected each layer once, got layer {layer} again")
                softmax.add(layer)
                layers[layer] = _softmax(attn)
        return shared_options(layers)

    def _attention_layers(self, attn: dict[str, Any]) -> list[int]:
        if (
            not isinstance(attn, dict)
            or set(attn) - ATTENTION
            or not {"layers", "num_heads"} <= set(attn)
            or attn.get("qkv_bias")
        ):
            raise ValueError(
                f"attn: expected layers, num_heads and options of {sorted(ATTENTION)} without bias, got {attn}"
            )
        layers, last = attn["layers"], (self.num_hidden_layers or 0) - 1
        if not isinstance(layers, list | tuple) or not all(
            type(layer) is int and 0 <= layer <= last for layer in layers
        ):
            raise ValueError(f"attn: expected layers from 0 to {last}, got {layers}")
        return list(layers)

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        return [name for name in super().unknown_fields(names) if name not in cls.expected and name not in cls.ignored]

    def to_dict(self) -> dict[str, Any]:
        """Omit the fields of ``DERIVED``, which the format does not have."""
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED}


def _family(config: FLAConfig) -> str:
    """Return the family's name for messages, such as ``GLA``."""
    return type(config).__name__.removeprefix("HybridAttn").removesuffix("Config")


def _softmax(attn: dict[str, Any]) -> LayerMixer:
    """Return the mixer of the layers of one object of ``attn``."""
    options = {
        "num_heads": attn["num_heads"],
        "num_key_value_heads": attn.get("num_kv_heads"),
        "rope_theta": attn.get("rope_theta", 10000.0),
    }
    window = attn.get("window_size")
    return LayerMixer("full", options) if window is None else LayerMixer("window", {**options, "window": window})


def per_head(name: str, size: float, heads: int) -> int:
    """Divide a dimension by the number of heads; ``name`` is the field in the error."""
    whole = round(size)
    if size <= 0 or whole % heads or not math.isclose(size, whole):
        raise ValueError(f"{name}: expected a dimension divisible by {heads} heads, got {size:g}")
    return whole // heads
