"""Configuration of the decoder. No ``from __future__ import annotations`` here: transformers reads the annotations."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from importlib import import_module
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .. import remote_code

CACHE_LAYER_TYPE = "hybridattn"
STATE_DTYPES = ("float32", "bfloat16", "float16")
_wants_models = ContextVar("_wants_models", default=True)


@contextmanager
def without_models() -> Iterator[None]:
    """Do not import the model classes, which takes seconds, for configurations made in this block.

    AutoModel learns of the classes from the first configuration that is made outside the block.
    """
    token = _wants_models.set(False)
    try:
        yield
    finally:
        _wants_models.reset(token)


@strict
class HybridAttnConfig(PreTrainedConfig):
    """Configuration of a decoder whose layers each name their token mixer, so that any hybrid is a configuration.

    Args:
        vocab_size: size of the vocabulary.
        hidden_size: model dimension.
        intermediate_size: inner dimension of the MLP; 8/3 of hidden_size rounded up to a multiple of 32 by default,
            none with ``mlp="none"``.
        mixers: mixer of each layer, in order: names from ``hybridattn.models.decoder.mixers.MIXERS``. Or a pattern such
            as ``"1 full : 7 gla"``, repeated until there are ``num_hidden_layers``; kept as the list it stands for.
        mixer_options: for a mixer's name, the options of its layer (see its docstring).
        mlp: ``"swiglu"`` or ``"none"``.
        input_conv_size: taps of a depthwise causal convolution added to every mixer's input; None for none.
        initializer: ``"normal"``, weights with standard deviation ``initializer_range``; or ``"fan_in"``, the square
            root of one over a weight's inputs.
        rms_norm_eps: of every RMSNorm of the decoder.
        backend: of the operators: ``"reference"``, ``"torch"``, ``"triton"`` or None (the best there is).
        state_dtype: what recurrent states are kept in between calls, ``"float32"`` (also None), ``"bfloat16"`` or
            ``"float16"``; they are computed in fp32.

    Raises:
        ValueError: an option is not as above; of the wrong type altogether, huggingface_hub's StrictDataclassError.
    """

    model_type = "hybridattn"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan: ClassVar[dict[str, Sequence[list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    model_classes: ClassVar[str] = "hybridattn.models.decoder.modeling"  # the module that registers them

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    mixers: str | list[str] | tuple[str, ...] = ("gla",)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp: str = "swiglu"
    input_conv_size: int | None = None
    initializer: str = "normal"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    backend: str | None = None
    state_dtype: str | None = None
    num_hidden_layers: int | None = None
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if _wants_models.get():
            import_module(self.model_classes)  # AutoModel has no other hook
        from .mixers import MIXERS, tensor_parallel_plan

        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            if (size := getattr(self, name)) is not None and size <= 0:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if not self.mixers:
            raise ValueError(f"mixers: expected a list with a mixer for each layer, got {self.mixers!r}")
        if isinstance(self.mixers, str):
            self.mixers = expand_pattern(self.mixers, self.num_hidden_layers)
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
        if self.state_dtype not in (None, *STATE_DTYPES):
            raise ValueError(f"state_dtype: expected one of {[*STATE_DTYPES, None]}, got {self.state_dtype!r}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected 0 to {self.vocab_size - 1}, one of the vocabulary, got {self.pad_token_id}"
            )
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
        self.base_model_tp_plan = tensor_parallel_plan(  # pyright: ignore[reportAttributeAccessIssue]
            self.mixers, self.mixer_options
        )
        super().__post_init__(**kwargs)

    def __setstate__(self, state):
        import_module(self.model_classes)  # an unpickled configuration, in a worker process, skips __post_init__
        self.__dict__.update(state)

    def to_dict(self) -> dict[str, Any]:
        """Without ``layer_types``, which follow from ``mixers``: Trainer reads files as a plain PreTrainedConfig."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_types"}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As usual, with what makes the checkpoint open where nobody has imported hybridattn."""
        self.auto_map = remote_code.auto_map(type(self).__name__.removesuffix("Config"))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        remote_code.write(save_directory, type(self).__name__.removesuffix("Config"))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing: transformers would copy this file into checkpoints, where it cannot be imported."""

    def validate_layer_type(self):
        """Ours is not in transformers' closed vocabulary; it is set above, from ``mixers``."""


def expand_pattern(pattern: str, num_layers: int | None = None) -> list[str]:
    """The mixers that a pattern stands for, ``"1 full : 7 gla"``, repeated to ``num_layers`` or taken once.

    Raises:
        ValueError: it is not a list of "count mixer" between colons, or num_layers is no multiple of its length.
    """
    period: list[str] = []
    for part in pattern.split(":"):
        match = re.fullmatch(r"\s*([1-9]\d*)\s+(\w+)\s*", part)
        if match is None:
            raise ValueError(f"mixers: expected a pattern like '1 full : 7 gla', got {pattern!r}")
        period += [match[2]] * int(match[1])
    times, rest = divmod(num_layers or len(period), len(period))
    if rest:
        raise ValueError(
            f"num_hidden_layers: expected a multiple of {len(period)} for the mixers {pattern!r}, got {num_layers}"
        )
    return period * times
