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
    columns: tuple[str, ...] = ()  # weights whose columns processes can share by heads, and with them rows of o_proj


_QKV = ("q_proj", "k_proj", "v_proj")
# Options that keep something per head outside these weights, which nobody would share out.
_WHOLE = {"alibi", "sinks", "gate_per", "conv_size"}

MIXERS = {
    "full": Mixer(SoftmaxAttention, {}, columns=_QKV),
    "window": Mixer(SoftmaxAttention, {"window": 128}, columns=_QKV),
    "linear": Mixer(LinearAttention, {}, columns=_QKV),
    "taylor": Mixer(TaylorLinearAttention, {}, columns=_QKV),
    "prefix": Mixer(PrefixLinearAttention, {}, columns=(*_QKV, "k_prefix_proj", "v_prefix_proj")),
    "gla": Mixer(GatedLinearAttention, {}, columns=(*_QKV, "g_proj", "gk_proj.up")),
    "retention": Mixer(Retention, {}),
    "lightning": Mixer(LightningAttention, {}, told=("backend", "layer_idx", "num_layers")),
    "conv": Mixer(BaseConv, {}, told=()),
}


def tensor_parallel_plan(mixers: list[str], options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """How transformers shares the base model out: every MLP, and the mixers where all of them can be shared."""
    plan = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    used = set(mixers)
    if all(MIXERS[name].columns and not _asked(options.get(name, {})) & _WHOLE for name in used):
        plan |= {f"layers.*.mixer.{weight}": "colwise" for name in used for weight in MIXERS[name].columns}
        plan["layers.*.mixer.o_proj"] = "rowwise"
    return plan


def _asked(options: dict[str, Any]) -> set[str]:
    """The options that are not off."""
    return {name for name, value in options.items() if value not in (None, False, "channel")}


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
