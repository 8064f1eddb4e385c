"""The decoder's configuration.

No ``from __future__ import annotations`` here: transformers reads the annotations.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from .. import remote_code
from .mixer_list import Entry, LayerMixer, expand, layer_mixers

CACHE_LAYER_TYPE = "hybridattn"
STATE_DTYPES = ("float32", "bfloat16", "float16")
# Names that transformers gives to a configuration beside its declared fields.
TRANSFORMERS_FIELDS = {
    *("model_type", "num_labels", "name_or_path", "torch_dtype", "auto_map", "quantization_config"),
    *("output_attentions", "attn_implementation", "experts_implementation"),
}
_wants_models = ContextVar("_wants_models", default=True)


@contextmanager
def without_models() -> Iterator[None]:
    """Construct configurations without importing the model classes, which takes seconds.

    AutoModel learns of the classes from the first configuration that is constructed outside this block.
    """
    token = _wants_models.set(False)
    try:
        yield
    finally:
        _wants_models.reset(token)


@strict
class HybridAttnConfig(PreTrainedConfig):
    """Configuration of a decoder that may have another token mixer in every layer.

    All fields are checked here, not when the model is built: each mixer is made once without memory.

    Args:
        vocab_size: size of the vocabulary.
        hidden_size: model dimension.
        intermediate_size: inner dimension of the MLP; by default 8/3 of hidden_size, rounded up to a multiple of 32.
            None with ``mlp="none"``.
        mixers: the mixer of each layer. An entry is a name from ``hybridattn.models.decoder.mixers.MIXERS``, an alias,
            or an object with options of this layer: ``{"mixer": "window", "window": 512}``. A pattern such as
            ``"1 full : 7 gla"`` is repeated, and cut, to ``num_hidden_layers``; the configuration stores the list.
            GLA in every layer by default.
        mixer_options: default options of all layers with a mixer, by the mixer's name (see the layer's docstring).
        mixer_aliases: entries by further names, for patterns: ``{"local": {"mixer": "window", "window": 512}}``. The
            configuration stores the entries in ``mixers``, not the aliases.
        num_hidden_layers: number of layers. With a list of mixers it may be left out, or must be the list's length.
        mlp: ``"swiglu"`` or ``"none"``.
        input_conv_size: taps of a depthwise causal convolution that is added to every mixer's input; None for none.
        initializer: ``"normal"``: weights have the standard deviation ``initializer_range``; or ``"fan_in"``: it is
            1 / sqrt(number of inputs).
        rms_norm_eps: epsilon of every RMSNorm of the decoder.
        backend: backend of the operators: ``"reference"``, ``"torch"``, ``"triton"``, or None for the fastest that
            serves the device.
        state_dtype: dtype of recurrent states between calls: ``"float32"`` (the same as None), ``"bfloat16"`` or
            ``"float16"``. The operators compute in fp32 in any case.

    Raises:
        ValueError: a field is unknown or has a wrong value, or a mixer does not take its options.
        huggingface_hub.errors.StrictDataclassError: a field has a value of the wrong type.
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
    mixers: str | Sequence[Entry] | None = None
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixer_aliases: dict[str, Entry] = field(default_factory=dict)
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
        if unknown := self.unknown_fields(kwargs):
            close = get_close_matches(unknown[0], [each.name for each in fields(self)], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{unknown[0]}: expected a field of {type(self).__name__}, got an unknown name{hint}")
        if self.num_hidden_layers is not None and self.num_hidden_layers <= 0:
            raise ValueError(f"num_hidden_layers: expected a positive number, got {self.num_hidden_layers}")
        wanted = self.default_mixers(self.num_hidden_layers) if self.mixers is None else self.mixers
        self.mixers = expand(wanted, self.num_hidden_layers, self.mixer_aliases)
        self.num_hidden_layers = len(self.mixers)
        self.check()
        self.mixer_aliases = {}
        self.layer_types = [CACHE_LAYER_TYPE] * self.num_hidden_layers
        if self.mlp == "none":
            self.intermediate_size = None
        elif self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 32) * 32
        from .mixers import tensor_parallel_plan

        plan = tensor_parallel_plan(self.layer_mixers)
        self.base_model_tp_plan = plan  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__(**kwargs)

    @classmethod
    def default_mixers(cls, num_layers: int | None) -> list[Entry]:
        """Return the mixers of a configuration that names none."""
        return ["gla"] * (num_layers or 1)

    @property
    def layer_mixers(self) -> list[LayerMixer]:
        """The mixer of each layer: its name, and its options with the defaults of that name."""
        return layer_mixers(self.mixers, self.mixer_options)  # pyright: ignore[reportArgumentType]

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        """Return the names that are fields neither of this class nor of transformers."""
        known = {each.name for each in fields(cls)} | TRANSFORMERS_FIELDS  # pyright: ignore[reportArgumentType]
        known |= GenerationConfig._get_default_generation_params().keys()
        return [name for name in names if name not in known and not name.startswith("_")]

    def check(self) -> None:
        """Check that the fields have possible values and agree with each other.

        Raises:
            ValueError: a field that does not; the message names it.
        """
        from .mixers import MIXERS, check_mixer

        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            if (size := getattr(self, name)) is not None and size <= 0:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        for name, values in (
            ("mlp", ("swiglu", "none")),
            ("initializer", ("normal", "fan_in")),
            ("backend", ("reference", "torch", "triton", None)),
            ("state_dtype", (*STATE_DTYPES, None)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {list(values)}, got {getattr(self, name)!r}")
        if self.input_conv_size is not None and self.input_conv_size <= 0:
            raise ValueError(f"input_conv_size: expected a positive number or None, got {self.input_conv_size}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected 0 to {self.vocab_size - 1}, one of the vocabulary, got {self.pad_token_id}"
            )
        if self.num_hidden_layers != len(self.mixers or ()):
            raise ValueError(
                f"num_hidden_layers: expected {len(self.mixers or ())} (one per mixer), got {self.num_hidden_layers}"
            )
        if shadowed := sorted(MIXERS.keys() & self.mixer_aliases):
            raise ValueError(f"mixer_aliases: expected names that are no mixer's, got {shadowed}")
        checked: list[LayerMixer] = []
        for layer, mixer in enumerate(self.layer_mixers):
            if mixer not in checked:
                check_mixer(f"mixers[{layer}] ({mixer.name!r})", mixer, self.hidden_size)
                checked.append(mixer)
        for name, options in self.mixer_options.items():
            if all(mixer.name != name for mixer in checked):
                check_mixer(f"mixer_options[{name!r}]", LayerMixer(name, options), self.hidden_size)

    def __setstate__(self, state):
        import_module(self.model_classes)  # an unpickled configuration, in a worker process, skips __post_init__
        self.__dict__.update(state)

    def to_dict(self) -> dict[str, Any]:
        """Leave out what follows from ``mixers``: Trainer reads files as a plain PreTrainedConfig."""
        return {name: x for name, x in super().to_dict().items() if name not in ("layer_types", "mixer_aliases")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Construct from stored fields, and from ``kwargs`` over these: both are checked.

        Stored fields that are unknown become attributes, as in transformers, and a warning names them.
        """
        names = {each.name for each in fields(cls)} - {"dtype"}  # pyright: ignore[reportArgumentType]
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        unknown = {name: config_dict[name] for name in cls.unknown_fields(config_dict)}
        if unknown:
            warnings.warn(f"configuration: expected fields of {cls.__name__}, got {sorted(unknown)}", stacklevel=2)
        stored = {name: value for name, value in config_dict.items() if name not in unknown}
        result = super().from_dict({**stored, **given}, **kwargs)
        for name, value in unknown.items():
            setattr(result[0] if isinstance(result, tuple) else result, name, value)
        return result

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save as usual, and a module with which the checkpoint opens in programs that do not import hybridattn.

        Raises:
            ValueError: the fields no longer agree with each other.
        """
        self.check()
        self.auto_map = remote_code.auto_map(type(self).__name__.removesuffix("Config"))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        remote_code.write(save_directory, type(self).__name__.removesuffix("Config"))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: transformers would copy this file into checkpoints, where it cannot be imported."""

    def validate_layer_type(self):
        """Do nothing: the type of our caches is not in transformers' closed list, and follows from ``mixers``."""
