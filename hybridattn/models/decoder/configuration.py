"""``HybridAttnConfig``, the Hugging Face configuration of the decoder, and the checks of its fields.

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
# Fields that transformers stores in configurations without declaring them.
TRANSFORMERS_FIELDS = {
    *("model_type", "num_labels", "name_or_path", "torch_dtype", "auto_map", "quantization_config"),
    *("output_attentions", "attn_implementation", "experts_implementation", "return_unused_kwargs"),
}
_wants_models = ContextVar("_wants_models", default=True)


def generation_fields() -> set[str]:
    """Names that transformers moves from a stored configuration to the generation configuration."""
    return set(GenerationConfig._get_default_generation_params())


@contextmanager
def without_models() -> Iterator[None]:
    """Construct configurations without importing the model classes, whose import takes seconds.

    The first configuration constructed outside this block imports and registers the classes.
    """
    token = _wants_models.set(False)
    try:
        yield
    finally:
        _wants_models.reset(token)


@strict
class HybridAttnConfig(PreTrainedConfig):
    """Configuration of a decoder, in which each layer can have a different token mixer.

    The constructor checks all fields. It builds each different mixer once on the meta device.

    Args:
        vocab_size: size of the vocabulary.
        hidden_size: model dimension.
        intermediate_size: inner dimension of the MLP; by default 8/3 of hidden_size, rounded up to a multiple of 32.
            None with ``mlp="none"``.
        mixers: the mixer of each layer. An entry is a name from ``hybridattn.models.decoder.mixers.MIXERS``, an alias,
            or an object with options for this layer: ``{"mixer": "window", "window": 512}``. A pattern such as
            ``"1 full : 7 gla"`` is repeated and cut to ``num_hidden_layers``; the configuration stores the list. The
            default is GLA in every layer, and one layer.
        mixer_options: default options of all layers with a mixer, by the mixer's name (see the layer's docstring).
        mixer_aliases: additional names of entries, for patterns: ``{"local": {"mixer": "window", "window": 512}}``. The
            configuration stores the entries in ``mixers``, not the aliases.
        num_hidden_layers: number of layers. With a list of mixers it is optional, and must equal the list's length.
        mlp: ``"swiglu"`` or ``"none"``.
        input_conv_size: taps of a depthwise causal convolution, added to every mixer's input; None for none.
        initializer: standard deviation of the initial weights. ``"normal"``: ``initializer_range``. ``"fan_in"``:
            1 / sqrt(number of inputs).
        initializer_range: standard deviation of the initial weights with ``initializer="normal"``.
        rms_norm_eps: epsilon of every RMSNorm of the decoder.
        max_position_embeddings: longest sequence that the model was made for, in tokens. Nothing depends on it; other
            programs read it.
        tie_word_embeddings: use the embeddings as the weights of the language-model head.
        use_cache: return a cache by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens, as in transformers.
        backend: backend of the operators: ``"reference"``, ``"torch"``, ``"triton"``, or None for the fastest one
            that supports the device.
        state_dtype: dtype of recurrent states in the cache: ``"float32"`` (the same as None), ``"bfloat16"`` or
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
    model_classes: ClassVar[str] = "hybridattn.models.decoder.modeling"  # the module that defines and registers them

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    mixers: str | Sequence[Entry] | None = None
    mixer_options: dict[str, Any] = field(default_factory=dict)
    mixer_aliases: dict[str, Any] = field(default_factory=dict)
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
            import_module(self.model_classes)  # transformers has no other hook that could register them with AutoModel
        if unknown := self.unknown_fields(kwargs):
            close = get_close_matches(unknown[0], [each.name for each in fields(self)], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            hint = "; set it in model.generation_config" if unknown[0] in generation_fields() else hint
            raise ValueError(f"{unknown[0]}: expected a field of {type(self).__name__}, got an unknown name{hint}")
        if self.num_hidden_layers is not None and self.num_hidden_layers <= 0:
            raise ValueError(f"num_hidden_layers: expected a positive number, got {self.num_hidden_layers}")
        wanted = self.default_mixers(self.num_hidden_layers) if self.mixers is None else self.mixers
        self.mixers = expand(wanted, self.num_hidden_layers, self.mixer_aliases)
        self.num_hidden_layers = len(self.mixers)
        self.check_aliases()
        self.check()
        self.mixer_aliases = {}
        self.layer_types = [CACHE_LAYER_TYPE] * self.num_hidden_layers
        if self.mlp == "none":
            self.intermediate_size = None
        elif self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 32) * 32
        super().__post_init__(**kwargs)

    @classmethod
    def default_mixers(cls, num_layers: int | None) -> list[Entry]:
        """Return the mixers of a configuration without ``mixers``."""
        return ["gla"] * (num_layers or 1)

    @property
    def layer_mixers(self) -> list[LayerMixer]:
        """Name and options of each layer's mixer; ``mixer_options`` supplies the defaults."""
        return layer_mixers(self.mixers, self.mixer_options)  # pyright: ignore[reportArgumentType]

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        """Return the names that neither this class nor transformers has as fields."""
        known = {each.name for each in fields(cls)} | TRANSFORMERS_FIELDS  # pyright: ignore[reportArgumentType]
        return [name for name in names if name not in known and not name.startswith("_")]

    def check_aliases(self) -> None:
        """Check that ``mixer_aliases`` name entries that a layer could have."""
        from .mixers import MIXERS, check_mixer

        if shadowed := sorted(MIXERS.keys() & self.mixer_aliases):
            raise ValueError(f"mixer_aliases: expected names other than those of mixers, got {shadowed}")
        for alias, mixer in zip(self.mixer_aliases, layer_mixers([*self.mixer_aliases.values()], {}), strict=True):
            mixer = LayerMixer(mixer.name, {**self.mixer_options.get(mixer.name, {}), **mixer.options})
            check_mixer(f"mixer_aliases[{alias!r}]", mixer, self.hidden_size)

    def check(self) -> None:
        """Check the values of the fields and their consistency.

        Raises:
            ValueError: a field has a wrong value or contradicts another; the message names it.
        """
        from .mixers import BACKENDS, MIXERS, check_mixer, tensor_parallel_plan

        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps"):
            if (size := getattr(self, name)) is not None and not size > 0:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if not self.initializer_range >= 0:
            raise ValueError(f"initializer_range: expected a number of at least 0, got {self.initializer_range}")
        for name, values in (
            ("mlp", ("swiglu", "none")),
            ("initializer", ("normal", "fan_in")),
            ("backend", BACKENDS),
            ("state_dtype", (*STATE_DTYPES, None)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {list(values)}, got {getattr(self, name)!r}")
        if self.input_conv_size is not None and self.input_conv_size <= 0:
            raise ValueError(f"input_conv_size: expected a positive number or None, got {self.input_conv_size}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected 0 to {self.vocab_size - 1} (vocab_size - 1), got {self.pad_token_id}"
            )
        if not isinstance(self.mixers, list):
            raise ValueError(f"mixers: expected a list of entries, got {self.mixers!r}")
        expand(self.mixers, self.num_hidden_layers)
        if bad := [name for name, options in self.mixer_options.items() if not isinstance(options, dict)]:
            raise ValueError(f"mixer_options[{bad[0]!r}]: expected options by name, got {self.mixer_options[bad[0]]!r}")
        checked: list[LayerMixer] = []
        for layer, mixer in enumerate(self.layer_mixers):
            if mixer.name not in MIXERS:
                known = [*sorted(MIXERS), *self.mixer_aliases]
                raise ValueError(f"mixers[{layer}]: expected one of {known}, got {mixer.name!r}")
            if mixer not in checked:
                check_mixer(f"mixers[{layer}] ({mixer.name!r})", mixer, self.hidden_size)
                checked.append(mixer)
        for name, options in self.mixer_options.items():
            if all(mixer.name != name for mixer in checked):
                check_mixer(f"mixer_options[{name!r}]", LayerMixer(name, options), self.hidden_size)
        plan = tensor_parallel_plan(self.layer_mixers)
        self.base_model_tp_plan = plan  # pyright: ignore[reportAttributeAccessIssue]

    def __setstate__(self, state):
        import_module(self.model_classes)  # unpickling, as in a worker process, skips __post_init__
        self.__dict__.update(state)

    def to_dict(self) -> dict[str, Any]:
        """Omit fields that follow from ``mixers``, since Trainer reads the file as a plain PreTrainedConfig."""
        return {name: x for name, x in super().to_dict().items() if name not in ("layer_types", "mixer_aliases")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Construct a configuration from stored fields; ``kwargs`` override them, and both are checked.

        Unknown stored fields become attributes, as in transformers, and cause a warning that names them.
        """
        names = {each.name for each in fields(cls)} - {"dtype"}  # pyright: ignore[reportArgumentType]
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        for name in cls.unknown_fields(kwargs):  # transformers passes options of its own, which resemble no field
            if close := get_close_matches(name, names, n=1, cutoff=0.8):
                raise ValueError(f"{name}: expected a field of {cls.__name__}, got an unknown name; {close[0]!r}?")
        unknown = {name: config_dict[name] for name in cls.unknown_fields(config_dict)}
        unknown = {name: value for name, value in unknown.items() if name not in generation_fields()}
        if unknown:
            warnings.warn(f"configuration: expected fields of {cls.__name__}, got {sorted(unknown)}", stacklevel=2)
        skipped = {*unknown, *generation_fields()}
        stored = {name: value for name, value in config_dict.items() if name not in skipped}
        result = super().from_dict({**stored, **given}, **kwargs)
        for name, value in unknown.items():
            setattr(result[0] if isinstance(result, tuple) else result, name, value)
        return result

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save the configuration, and a module that lets programs that do not import hybridattn load the checkpoint.

        Raises:
            ValueError: a field was changed to a wrong or inconsistent value.
        """
        self.check()
        self.auto_map = remote_code.auto_map(type(self).__name__.removesuffix("Config"))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        remote_code.write(save_directory, type(self).__name__.removesuffix("Config"))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: transformers would copy this file into the checkpoint, where its imports fail."""

    def validate_layer_type(self):
        """Do nothing: transformers' closed list of layer types lacks the type of this package's caches."""
