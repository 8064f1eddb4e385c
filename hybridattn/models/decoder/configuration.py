"""Configuration of the decoder. No ``from __future__ import annotations`` here: transformers reads the annotations."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

CACHE_LAYER_TYPE = "hybridattn"


@strict
class HybridAttnConfig(PreTrainedConfig):
    """Configuration of a decoder whose layers each name their token mixer, so that any hybrid is a configuration.

    Args:
        vocab_size: size of the vocabulary.
        hidden_size: model dimension.
        intermediate_size: inner dimension of the MLP; 8/3 of hidden_size rounded up to a multiple of 32 by default,
            none with ``mlp="none"``.
        mixers: mixer of each layer, in order: names from ``hybridattn.models.decoder.mixers.MIXERS``.
        mixer_options: for a mixer's name, the options of its layer (see its docstring).
        mlp: ``"swiglu"`` or ``"none"``.
        conv_size: taps of a depthwise causal convolution added to every mixer's input; None for none.
        initializer: ``"normal"``, weights with standard deviation ``initializer_range``; or ``"fan_in"``, the square
            root of one over a weight's inputs.
        rms_norm_eps: of every RMSNorm of the decoder.
        backend: of the operators: ``"reference"``, ``"torch"``, ``"triton"`` or None (the best there is).

    Raises:
        ValueError: an option is not as above; of the wrong type altogether, huggingface_hub's StrictDataclassError.
    """

    model_type = "hybridattn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    mixers: list[str] | tuple[str, ...] = ("gla",)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp: str = "swiglu"
    conv_size: int | None = None
    initializer: str = "normal"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    backend: str | None = None
    num_hidden_layers: int | None = None
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        from . import modeling  # noqa: F401  (registers the model classes: AutoModel has no other hook)
        from .mixers import MIXERS

        if not self.mixers:
            raise ValueError(f"mixers: expected a list with a mixer for each layer, got {self.mixers!r}")
        self.mixers = list(self.mixers)
        for name in (*self.mixers, *self.mixer_options):
            if name not in MIXERS:
                raise ValueError(f"mixers: expected names from {sorted(MIXERS)}, got {name!r}")
        if self.mlp not in ("swiglu", "none"):
            raise ValueError(f"mlp: expected 'swiglu' or 'none', got {self.mlp!r}")
        if self.initializer not in ("normal", "fan_in"):
            raise ValueError(f"initializer: expected 'normal' or 'fan_in', got {self.initializer!r}")
        if self.backend not in (None, "reference", "torch", "triton"):
            raise ValueError(f"backend: expected one of ['reference', 'torch', 'triton', None], got {self.backend!r}")
        if self.num_hidden_layers not in (None, len(self.mixers)):
            raise ValueError(
                f"num_hidden_layers: expected {len(self.mixers)} (one per mixer), got {self.num_hidden_layers}"
            )
        self.num_hidden_layers = len(self.mixers)
        self.layer_types = [CACHE_LAYER_TYPE] * self.num_hidden_layers
        if self.mlp == "none":
            self.intermediate_size = None
        elif self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 32) * 32
        super().__post_init__(**kwargs)

    def __setstate__(self, state):
        from . import modeling  # noqa: F401  (an unpickled configuration, in a worker process, skips __post_init__)

        self.__dict__.update(state)

    def to_dict(self) -> dict[str, Any]:
        """Without ``layer_types``, which follow from ``mixers``: Trainer reads files as a plain PreTrainedConfig."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_types"}

    def validate_layer_type(self):
        """Ours is not in transformers' closed vocabulary; it is set above, from ``mixers``."""


AutoConfig.register(HybridAttnConfig.model_type, HybridAttnConfig, exist_ok=True)
