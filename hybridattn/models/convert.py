"""Convert checkpoints of other libraries to ``HybridAttnForCausalLM``.

Three formats are supported: GLA, DeltaNet, Gated DeltaNet and KDA of flash-linear-attention, Mamba-2 of transformers,
and the released models of BASED, a GPT-2 configuration with ``mixer``, ``alt_mixer`` and ``alt_mixer_2``. If a weight
is unknown, missing or of another shape, the error lists its name and nothing is written.
"""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .convert_mamba2 import from_mamba2
from .decoder import HybridAttnConfig, HybridAttnForCausalLM
from .families import (
    HybridAttnDeltaNetForCausalLM,
    HybridAttnGatedDeltaNetForCausalLM,
    HybridAttnGLAForCausalLM,
    HybridAttnKDAForCausalLM,
)

FLA_MODELS: dict[str, type[HybridAttnForCausalLM]] = {
    "gla": HybridAttnGLAForCausalLM,
    "delta_net": HybridAttnDeltaNetForCausalLM,
    "gated_deltanet": HybridAttnGatedDeltaNetForCausalLM,
    "kda": HybridAttnKDAForCausalLM,
}
# Files of the tokenizer and of generation, which are copied unchanged.
COPIED_FILES = (
    "generation_config.json",
    "token*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
)
# Metrics of the trainer in BASED's released files, and rotary frequencies, which follow from the configuration.
IGNORED = re.compile(r"(^|\.)(train|val|test)_metrics\.|\.rotary_emb\.inv_freq$")
NAMES = {
    r"^transformer\.embeddings\.word_embeddings\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.": "model.",
    r"\.norm1\.": ".input_layernorm.",
    r"\.norm2\.": ".post_attention_layernorm.",
    r"\.mlp\.fc2\.": ".mlp.down_proj.",
    r"\.mixer\.proj_([qkv])\.": r".mixer.\1_proj.",
    r"\.mixer\.conv1?\.conv\.": ".mixer.conv.",
}
# Required values of fields of BASED's GPT-2 configurations that this library's decoder has no option for.
EXPECTED = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "prenorm": True,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "n_head_kv": None,
    "lm_head_bias": False,
    "word_embed_proj_dim": None,
    "fixed_decay": False,
}
# Options of BASED's mixers that are either read here or do not change the output.
KNOWN = {
    "SlidingAttention": {"_target_", "window_size", "num_heads", "causal"},
    "LinearAttention": {
        *("_target_", "feature_map", "feature_dim", "num_heads", "l_max"),
        *("parallel_implementation", "inference_implementation", "silent"),
    },
    "BaseConv": {"_target_", "l_max", "kernel_size", "kernel_sizes", "expand_proj", "use_bias", "use_cuda"},
}
KNOWN["BaseConvWithSiLU4"] = KNOWN["BaseConv"] | {"implicit_long_conv"}
DEFAULTS = {  # of BASED's own code, for absent fields
    "activation_function": "gelu_new",
    "rms_norm": False,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
}


def convert(source: str | Path, target: str | Path) -> HybridAttnForCausalLM:
    """Convert the checkpoint in folder ``source``; write it to a new folder ``target`` with tokenizer files.

    Returns:
        The converted model.

    Raises:
        ValueError: the source has no known format, its configuration has an unsupported value, a weight is unknown,
            missing or of another shape, or the target is not empty.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise ValueError(f"source: expected a folder with config.json, got {str(source)!r}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: expected a new or empty folder, got {str(target)!r}")
    fields = _read_fields(source / "config.json")
    model_type = fields.get("model_type")
    if model_type in FLA_MODELS:
        model = _from_fla(source, FLA_MODELS[model_type])
    elif model_type == "mamba2":
        model = filled(*from_mamba2(source, fields, read_weights(source)))
    elif "mixer" in fields or "alt_mixer" in fields:
        model = _from_based(fields, read_weights(source))
    else:
        known = [*FLA_MODELS, "mamba2"]
        raise ValueError(
            f"source: expected model_type in {known} or the mixers of BASED in config.json, got {model_type!r}"
        )
    model.save_pretrained(target)
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)
    return model


def _read_fields(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"source: expected JSON in {str(file)!r}, got an error: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"source: expected a mapping in {str(file)!r}, got {fields!r:.50}")
    return fields


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights in a folder: safetensors if there are any, else pickles, read with ``weights_only=True``."""
    for ending, read in (("safetensors", load_file), ("bin", _unpickle)):
        stem = "model" if ending == "safetensors" else "pytorch_model"
        index = folder / f"{stem}.{ending}.index.json"
        if (folder / f"{stem}.{ending}").is_file():
            return read(folder / f"{stem}.{ending}")
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {name: x for file in files for name, x in read(folder / file).items()}
    raise ValueError(f"source: expected model.safetensors or pytorch_model.bin in {str(folder)!r}, got neither")


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"source: expected weights in {str(file)!r}, got an error: {error}") from error


def _from_fla(source: Path, model_class: type[HybridAttnForCausalLM]) -> HybridAttnForCausalLM:
    try:
        loaded: Any = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"source: expected weights in {str(source)!r}, got an error: {error}") from error
    source_model, info = loaded
    _check_names(info["unexpected_keys"], info["missing_keys"])
    _check_shapes({name: (got, wanted) for name, got, wanted in info["mismatched_keys"]})
    shared = (
        *("vocab_size", "hidden_size", "intermediate_size", "mixers", "mixer_options", "rms_norm_eps", "dtype"),
        *("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    config = HybridAttnConfig(**{name: getattr(source_model.config, name) for name in shared})
    return filled(config, source_model.state_dict())


def _from_based(fields: dict[str, Any], weights: dict[str, Tensor]) -> HybridAttnForCausalLM:
    for name, expected in EXPECTED.items():
        if (got := fields.get(name, DEFAULTS.get(name, expected))) != expected:
            raise ValueError(f"{name}: expected {expected!r} in a BASED model, got {got!r}")
    weights = {name.removeprefix("model."): x for name, x in weights.items() if not IGNORED.search(name)}
    embeddings = weights.get("transformer.embeddings.word_embeddings.weight")
    fc1 = weights.get("transformer.layers.0.mlp.fc1.weight")
    if embeddings is None or fc1 is None:
        raise ValueError("source: expected transformer.embeddings.word_embeddings.weight and an MLP, got neither")
    mixers, options = _based_mixers(fields)
    config = HybridAttnConfig(
        vocab_size=len(embeddings),  # the file pads n_vocab to a multiple
        hidden_size=_needed(fields, "n_embd"),
        intermediate_size=len(fc1) // 2,
        mixers=mixers,
        mixer_options=options,
        rms_norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=fields.get("tie_word_embeddings", True),
        max_position_embeddings=fields.get("n_positions") or 2048,
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=fields.get("eos_token_id"),
        dtype=embeddings.dtype,
    )
    renamed = dict(pair for name, x in weights.items() for pair in _based_names(name, x, mixers))
    for layer, mixer in enumerate(mixers):
        if mixer == "conv":  # biases are optional in BASED
            prefix = f"model.layers.{layer}.mixer."
            for part in ("in_proj", "conv", "out_proj"):
                if (weight := renamed.get(f"{prefix}{part}.weight")) is not None:
                    renamed.setdefault(f"{prefix}{part}.bias", weight.new_zeros(len(weight)))
    return filled(config, renamed)


def _based_mixers(fields: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the mixer of every layer, and the options of each mixer."""
    kinds = [_based_mixer(fields, name) for name in ("mixer", "alt_mixer", "alt_mixer_2")]
    for name in ("alt_mixer_layers", "alt_mixer_2_layers"):
        if outside := [layer for layer in fields.get(name) or () if layer not in range(_needed(fields, "n_layer"))]:
            raise ValueError(f"{name}: expected layers from 0 to {fields['n_layer'] - 1}, got {outside}")
    chosen = [
        2 if layer in (fields.get("alt_mixer_2_layers") or ()) else int(layer in (fields.get("alt_mixer_layers") or ()))
        for layer in range(_needed(fields, "n_layer"))
    ]
    options: dict[str, dict[str, Any]] = {}
    for kind in sorted(set(chosen)):
        name, found = kinds[kind]
        if options.setdefault(name, found) != found:
            raise ValueError(f"alt_mixer_2: expected one kind of {name} layers, got two")
    return [kinds[kind][0] for kind in chosen], options


def _based_mixer(fields: dict[str, Any], role: str) -> tuple[str, dict[str, Any]]:
    heads, rotary = _needed(fields, "n_head"), fields.get("rotary_emb_fraction", 0.0)
    if rotary not in (0, 1):
        raise ValueError(f"rotary_emb_fraction: expected 0 or 1, got {rotary!r}")
    theta = fields.get("rotary_emb_base", 10000.0) if rotary else None
    mixer = fields.get(role)
    if mixer is None:
        return "full", {"num_heads": heads, "rope_theta": theta}
    target = _needed(mixer, "_target_", role).rpartition(".")[2]
    if unknown := sorted(set(mixer) - KNOWN.get(target, set(mixer))):
        raise ValueError(f"{role}: expected options of {target} in {sorted(KNOWN[target])}, got {unknown}")
    if target == "SlidingAttention":  # it sees window_size // 2 tokens and the token itself
        return "window", {
            "num_heads": heads,
            "rope_theta": theta,
            "window": _needed(mixer, "window_size", role) // 2 + 1,
        }
    if target == "LinearAttention":
        feature_map = _needed(mixer, "feature_map", role)
        features = _needed(feature_map, "_target_", role).rpartition(".")[2]
        if features != "TaylorExp" or set(feature_map) - {"_target_", "input_dim"}:
            raise ValueError(f"{role}: expected the feature map TaylorExp with input_dim alone, got {feature_map}")
        return "taylor", {"num_heads": mixer.get("num_heads", 16), "key_dim": mixer.get("feature_dim", 16)}
    if target in ("BaseConv", "BaseConvWithSiLU4"):
        taps = mixer.get("kernel_sizes", mixer.get("kernel_size", 3))
        if isinstance(taps, list):
            if len(taps) != 1:
                raise ValueError(f"{role}: expected one size in kernel_sizes, got {taps}")
            (taps,) = taps
        return "conv", {"kernel_size": taps, "expand": mixer.get("expand_proj", 2) // 2}
    raise ValueError(f"{role}: expected BaseConv, LinearAttention or SlidingAttention, got {target!r}")


def _needed(fields: dict[str, Any], name: str, where: str = "config.json") -> Any:
    if name not in fields:
        raise ValueError(f"{name}: expected it in {where} of a BASED model, got {sorted(fields)}")
    return fields[name]


def _based_names(name: str, x: Tensor, mixers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight with its new name, or the parts of a fused weight with new names."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    layer = re.match(r"model\.layers\.(\d+)\.mixer\.out_proj\.", name)
    if layer and int(layer[1]) < len(mixers) and mixers[int(layer[1])] != "conv":
        name = name.replace("out_proj", "o_proj")
    if name.endswith(".mlp.fc1.weight"):  # up projection first, then the gate
        for part, half in zip(("up_proj", "gate_proj"), x.chunk(2), strict=True):
            yield name.replace("fc1", part), half
    elif name.endswith(".mixer.Wqkv.weight"):
        for part, third in zip("qkv", x.chunk(3), strict=True):
            yield name.replace("Wqkv", f"{part}_proj"), third
    else:
        yield name, x


def filled(config: HybridAttnConfig, weights: dict[str, Tensor]) -> HybridAttnForCausalLM:
    """Return a model of this configuration with these weights; raise ValueError unless names and shapes match.

    With ``tie_word_embeddings``, ``lm_head.weight`` may be missing, or equals the embeddings.
    """
    embeddings = weights.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and embeddings is not None:
        if not torch.equal(weights.get("lm_head.weight", embeddings), embeddings):
            raise ValueError("lm_head.weight: expected the embeddings, with tie_word_embeddings, got other values")
        weights = {**weights, "lm_head.weight": embeddings}
    with torch.device("meta"):
        model = HybridAttnForCausalLM(config)
    expected = model.state_dict()
    _check_names(set(weights) - set(expected), set(expected) - set(weights))
    shapes = {name: (x.shape, expected[name].shape) for name, x in weights.items()}
    _check_shapes({name: pair for name, pair in shapes.items() if pair[0] != pair[1]})
    model = HybridAttnForCausalLM._from_config(config, dtype=config.dtype)
    model.load_state_dict(weights)
    return model


def _check_shapes(wrong: dict[str, tuple[torch.Size, torch.Size]]) -> None:
    if wrong:
        listed = [f"{name} {list(got)} for {list(wanted)}" for name, (got, wanted) in sorted(wrong.items())]
        raise ValueError(f"source: expected weights of the configuration's shapes, got {', '.join(listed)}")


def _check_names(unknown: set[str], missing: set[str]) -> None:
    if unknown or missing:
        raise ValueError(
            f"source: expected every weight of the model and no other; "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}; missing: {', '.join(sorted(missing)) or 'none'}"
        )
