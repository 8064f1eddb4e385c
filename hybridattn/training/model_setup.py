"""Create or load the tokenizer, configuration and model of a training run, with frozen parameters and LoRA adapters."""

import warnings
from dataclasses import fields
from fnmatch import fnmatch
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybridattn.models.decoder import HybridAttnConfig
from hybridattn.models.presets import PRESETS

from .arguments import ModelArguments
from .byte_corpus import byte_tokenizer


def build_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the named tokenizer, by default the model's; ``"bytes"`` is the built-in byte tokenizer.

    Raises:
        ValueError: no tokenizer has that name.
    """
    name = arguments.tokenizer or arguments.model
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: expected 'bytes', a folder or a name on the Hub, got {name!r}: {error}"
        ) from error


def build_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Load the configuration of a saved model, or create one; a new one gets the tokenizer's special token ids.

    Raises:
        ValueError: no such preset or model, a wrong option, or a tokenizer larger than the vocabulary.
    """
    options: Any = arguments.config or {}
    if arguments.model is not None:
        try:
            config = AutoConfig.from_pretrained(arguments.model)
        except OSError as error:
            raise ValueError(
                f"model: expected a folder or a name on the Hub, got {arguments.model!r}: {error}"
            ) from error
    else:
        config = new_config(arguments.preset, options)
    vocab_size: int = getattr(config.get_text_config(), "vocab_size")  # noqa: B009  (no attribute of the base class)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: expected at most vocab_size {vocab_size} tokens, got {len(tokenizer)}")
    if arguments.model is None:
        for name in {"bos_token_id", "eos_token_id", "pad_token_id"} - set(options):
            setattr(config, name, getattr(tokenizer, name))
    return config


def new_config(preset: str | None, options: dict[str, Any]) -> PreTrainedConfig:
    """Create the configuration of a preset or of a ``model_type`` of transformers; ``options`` override its fields.

    Raises:
        ValueError: no such preset, model type or option.
    """
    options = dict(options)
    kind = options.pop("model_type", HybridAttnConfig.model_type)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    if preset is None and kind not in CONFIG_MAPPING:
        raise ValueError(f"config: expected a model_type of transformers, such as 'llama', got {kind!r}")
    make: Any = PRESETS[preset] if preset else CONFIG_MAPPING[kind]
    family = getattr(make, "func", make)  # a preset may be a functools.partial of the configuration class
    if unknown := sorted(set(options) - {field.name for field in fields(family)} - {"attn_implementation"}):
        raise ValueError(f"config: expected arguments of {family.__name__}, got {unknown}")
    try:
        return make(**options)
    except StrictDataclassError as error:
        raise ValueError(f"config: {error}") from error


def build_model(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Create or load the model in fp32, freeze the parameters that ``freeze`` names and add LoRA adapters.

    Raises:
        ValueError: no such model, a pattern that matches no parameter, or adapters that peft rejects.
    """
    if arguments.model is None:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, config=config, dtype=torch.float32)
        except OSError as error:
            raise ValueError(f"model: expected saved weights in {arguments.model!r}, got {error}") from error
    for pattern in arguments.freeze:
        fitting = [parameter for name, parameter in model.named_parameters() if fnmatch(name, pattern)]
        if not fitting:
            raise ValueError(f"freeze: expected patterns of parameter names, got {pattern!r}, which matches none")
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: expected patterns that leave a parameter to train, got {arguments.freeze}")
    options: Any = arguments.lora
    return model if options is None else add_lora(model, options)


def add_lora(model: PreTrainedModel, options: dict[str, Any]) -> Any:
    """Wrap a model in ``peft.PeftModel``, by default with adapters on every linear layer but the head.

    Args:
        model: the model to adapt.
        options: arguments of ``peft.LoraConfig``; ``target_modules`` selects other layers.

    Raises:
        ValueError: an option or a value that peft rejects.
    """
    import peft

    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **options})
        with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error
