"""Load a Llama, Mistral or Qwen3 into this library's decoder and replace some of its attention layers by other mixers.

``from_softmax`` loads the model unchanged, ``swap`` replaces mixers. A new mixer starts from the weights of the
attention that it replaces, as in T2R (Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2021), SUPRA
(Mercat et al., "Linearizing Large Language Models", 2024), "The Mamba in the Llama" (Wang et al., 2024) and LoLCATs
(Zhang et al., 2024).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .convert import filled, read_weights
from .decoder import HybridAttnConfig, HybridAttnForCausalLM
from .decoder.mixer_list import Entry, LayerMixer, expand, layer_mixers, shared_options

FAMILIES = ("llama", "mistral", "qwen3")
# Required values of fields that this library's decoder has no option for.
EXPECTED = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0}
MOST_TAYLOR_KEYS = 16  # BASED's d'; the number of features grows with its square
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps", "initializer_range", "dtype"),
    *("max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def from_softmax(source: str | Path) -> HybridAttnForCausalLM:
    """Load a saved Llama, Mistral or Qwen3 into this library's decoder, as the same function.

    Args:
        source: folder with config.json and weights.

    Returns:
        A model with ``full`` and ``window`` mixers.

    Raises:
        ValueError: the source is another model, its configuration has an unsupported value, or a weight is unknown,
            missing or of another shape.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json, got {str(source)!r}")
    source_config = AutoConfig.from_pretrained(source)
    if source_config.model_type not in FAMILIES:
        raise ValueError(f"model: expected a model_type of {list(FAMILIES)}, got {source_config.model_type!r}")
    for name, expected in EXPECTED.items():
        if (got := getattr(source_config, name, expected)) != expected:
            raise ValueError(f"{name}: expected {expected!r} in a model to linearise, got {got!r}")
    windows = _windows(source_config)
    attention = _attention(source_config)
    mixers, options = shared_options(
        LayerMixer("full", attention) if window is None else LayerMixer("window", {**attention, "window": window})
        for window in windows
    )
    config = HybridAttnConfig(
        **{name: getattr(source_config, name) for name in SHARED}, mixers=mixers, mixer_options=options
    )
    weights = {
        name.replace(".self_attn.", ".mixer."): x
        for name, x in read_weights(source).items()
        if not IGNORED.search(name)
    }
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return filled(config, weights)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer, None for full attention."""
    if config.model_type == "llama":  # ignores sliding_window, which configurations converted from Mistral may have
        return [None] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "mistral" or kinds is None:
        return [window] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types: expected full_attention or sliding_attention, got {unknown}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _attention(config: Any) -> dict[str, Any]:
    """Return the options of ``SoftmaxAttention`` that all layers share."""
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: expected 1.0 in a model to linearise, got another value")
    if kind == "yarn":  # the default of transformers
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    options: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": theta,
    }
    if kind != "default":
        options["rope_scaling"] = rope
    if config.model_type == "qwen3":
        options |= {"qk_norm": True, "norm_eps": config.rms_norm_eps}
    if getattr(config, "attention_bias", False):
        options["bias"] = True
    return options


def swap(
    teacher: HybridAttnForCausalLM, mixers: str | Sequence[Entry], options: dict[str, dict[str, Any]] | None = None
) -> HybridAttnForCausalLM:
    """Return a copy of a softmax model in which some layers have another mixer, with the weights that it can take.

    Weights that both mixers have under one name and in one shape are copied: the projections of queries, keys, values
    and outputs. Heads of keys and values that several queries share are repeated. Other weights of a new mixer, such
    as gates and norms, are initialised as in a new model. Norms of queries and keys are left out where a new mixer has
    none.

    Args:
        teacher: a model from ``from_softmax``.
        mixers: a pattern such as ``"1 full : 3 gla"`` or an entry for every layer; ``"full"`` keeps the teacher's own.
        options: options of the new layers by the mixer's name, over those with which it has the teacher's shape.

    Raises:
        ValueError: an unknown mixer or option, another number of layers, options of a mixer that no new layer has, or
            attention with biases where a new mixer has none.
    """
    old, options = teacher.config, options or {}
    if bad := [name for name, given in options.items() if not isinstance(given, dict)]:
        raise ValueError(f"mixer_options[{bad[0]!r}]: expected options by name, got {options[bad[0]]!r}")
    entries = expand(mixers, len(old.layer_mixers) if isinstance(mixers, str) else None)
    if len(entries) != len(old.layer_mixers):
        raise ValueError(f"mixers: expected one for each of the {len(old.layer_mixers)} layers, got {len(entries)}")
    layers, replaced = [], set()
    for entry, own, (name, given) in zip(entries, old.layer_mixers, layer_mixers(entries, options), strict=True):
        if entry == "full":
            layers.append(own)
            continue
        replaced.add(name)
        layers.append(LayerMixer(name, {**starting_options(name, own), **given}))
    if unused := sorted(options.keys() - replaced):
        raise ValueError(f"mixer_options: expected mixers of {sorted(replaced)}, the new layers, got {unused}")
    if old.layer_mixers[0].options.get("bias") and (without := sorted(replaced - {"full", "window"})):
        raise ValueError(f"attention_bias: expected False where layers become {without}, got True")
    names, defaults = shared_options(layers)
    config = HybridAttnConfig(**{name: getattr(old, name) for name in SHARED}, mixers=names, mixer_options=defaults)
    student = HybridAttnForCausalLM._from_config(config, dtype=config.dtype)
    student.load_state_dict(inherited(student, teacher), strict=False)
    return student


def starting_options(mixer: str, own: LayerMixer) -> dict[str, Any]:
    """Return options with which a mixer has heads as the softmax attention ``own``, if it has such options."""
    if mixer == own.name:
        return own.options
    attention = {name: value for name, value in own.options.items() if name != "window"}
    if mixer in ("full", "window"):
        return attention
    heads, theta = {"num_heads": attention["num_heads"]}, {"rope_theta": attention["rope_theta"]}
    same = {**heads, "key_dim": attention["head_dim"], "value_dim": attention["head_dim"]}
    few = {**same, "key_dim": min(attention["head_dim"], MOST_TAYLOR_KEYS)}
    return {
        "gla": {**same, **theta, "gate_bias_range": [4.0, 6.0]},
        **{name: {**same, "conv_size": None} for name in ("delta", "gated_delta", "kda")},
        "linear": same,
        "taylor": few,
        "prefix": few,
        "retention": {**same, **theta},
        "lightning": {**same, **theta},
    }.get(mixer, {})


def replaced_layers(student: HybridAttnForCausalLM, teacher: HybridAttnForCausalLM) -> list[int]:
    """Return the layers whose mixers are of another kind, or have other options."""
    pairs = enumerate(zip(student.config.layer_mixers, teacher.config.layer_mixers, strict=True))
    return [layer for layer, (new, old) in pairs if new != old]


def mixer_of(model: HybridAttnForCausalLM, layer: int) -> Any:
    """Return the token mixer of a layer."""
    block: Any = model.model.layers[layer]
    return block.mixer


def inherited(student: HybridAttnForCausalLM, teacher: HybridAttnForCausalLM) -> dict[str, Tensor]:
    """Return the teacher's weights from which the student starts, by name, in the student's shapes."""
    taken = {name: x for name, x in teacher.state_dict().items() if name in student.state_dict()}
    for i in replaced_layers(student, teacher):
        new, old = mixer_of(student, i), mixer_of(teacher, i)
        prefix = f"model.layers.{i}.mixer."
        for name in [name for name in taken if name.startswith(prefix)]:
            part = name.removeprefix(prefix).partition(".")[0]
            keys_or_values = "key_dim" if part in ("q_proj", "k_proj") else "value_dim"
            same_heads = getattr(new, "num_heads", None) == old.num_heads
            if not same_heads or getattr(new, keys_or_values, getattr(new, "head_dim", None)) != old.head_dim:
                del taken[name]
            elif part in ("k_proj", "v_proj"):
                rows = len(student.get_parameter(name))
                if rows % len(taken[name]):  # the student has fewer heads than the teacher
                    del taken[name]
                else:
                    taken[name] = _repeated(taken[name], old.head_dim, rows)
    return taken


def _repeated(x: Tensor, head_dim: int, rows: int) -> Tensor:
    """Repeat shared heads: weights [G D,..] or biases [G D] become [rows,..], one copy of a head per query head."""
    return x.unflatten(0, (-1, head_dim)).repeat_interleave(rows // len(x), 0).flatten(0, 1)
