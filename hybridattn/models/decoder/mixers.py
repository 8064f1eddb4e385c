"""The mixers a configuration can name: name -> layer and the options it starts from. A new mixer is one row here."""

from typing import Any, NamedTuple

from ...layers import (
    BaseConv,
    GatedLinearAttention,
    LightningAttention,
    LinearAttention,
    PrefixLinearAttention,
    Retention,
    SoftmaxAttention,
    TaylorLinearAttention,
    TokenMixer,
)


class Mixer(NamedTuple):
    layer: type[TokenMixer]
    options: dict[str, Any]
    told: tuple[str, ...] = ("backend",)  # what the layer is told by the decoder: these options of ``build_mixer``


MIXERS = {
    "full": Mixer(SoftmaxAttention, {}),
    "window": Mixer(SoftmaxAttention, {"window": 128}),
    "linear": Mixer(LinearAttention, {}),
    "taylor": Mixer(TaylorLinearAttention, {}),
    "prefix": Mixer(PrefixLinearAttention, {}),
    "gla": Mixer(GatedLinearAttention, {}),
    "retention": Mixer(Retention, {}),
    "lightning": Mixer(LightningAttention, {}, told=("backend", "layer_idx", "num_layers")),
    "conv": Mixer(BaseConv, {}, told=()),
}


# Mixers whose heads can be split between processes, and the options that keep something per head outside the weights.
_SPLIT = ("full", "window", "linear", "taylor", "prefix", "gla")
_WHOLE = ("alibi", "sinks", "gate_per", "conv_size")
_COLUMNS = ("q_proj", "k_proj", "v_proj", "k_prefix_proj", "v_prefix_proj", "g_proj", "gk_proj.1")


def tensor_parallel_plan(mixers: list[str], options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """How transformers splits the base model's weights: every MLP, and the mixers where all of them can be split."""
    plan = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    if all(name in _SPLIT and not set(options.get(name, {})) & set(_WHOLE) for name in mixers):
        plan |= {f"layers.*.mixer.{name}": "colwise" for name in _COLUMNS} | {"layers.*.mixer.o_proj": "rowwise"}
    return plan


def build_mixer(
    name: str,
    hidden_size: int,
    options: dict[str, Any],
    *,
    backend: str | None = None,
    layer_idx: int = 0,
    num_layers: int = 1,
) -> TokenMixer:
    """The layer of mixer ``name`` with ``options`` over its own, told what it asks for of the model it stands in.

    Raises:
        ValueError: unknown mixer, or an option it does not have or cannot take.
    """
    if name not in MIXERS:
        raise ValueError(f"mixers: expected names from {sorted(MIXERS)}, got {name!r}")
    mixer = MIXERS[name]
    model = {"backend": backend, "layer_idx": layer_idx, "num_layers": num_layers}
    merged = {**{key: model[key] for key in mixer.told}, **mixer.options, **options}
    try:
        return mixer.layer(hidden_size, **merged)
    except TypeError as error:
        raise ValueError(f"mixer_options[{name!r}]: {error}") from error
