"""Table of the mixers that a configuration can name, and functions that build and check their layers.

To add a mixer, add a row to ``MIXERS``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator

from ...layers import (
    BaseConv,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    Mamba2,
    PrefixLinearAttention,
    Retention,
    SoftmaxAttention,
    TaylorLinearAttention,
    TokenMixer,
)
from .mixer_list import LayerMixer


class Mixer(NamedTuple):
    """A row of ``MIXERS``.

    Attributes:
        layer: class of the layer.
        options: options that differ from the layer's own defaults.
        from_model: options that the decoder sets, as arguments of ``build_mixer``.
        columns: weights that tensor parallelism splits by columns into heads. It then splits ``o_proj`` by rows. Empty
            if the mixer cannot be split.
    """

    layer: type[TokenMixer]
    options: dict[str, Any]
    from_model: tuple[str, ...] = ("backend",)
    columns: tuple[str, ...] = ()


BACKENDS = ("reference", "torch", "triton", None)
_QKV = ("q_proj", "k_proj", "v_proj")
# Options that add parameters or constants per head, which tensor parallelism does not split.
_UNSPLIT = {"alibi", "sinks", "gate_per", "conv_size"}

MIXERS = {
    "full": Mixer(SoftmaxAttention, {}, columns=_QKV),
    "window": Mixer(SoftmaxAttention, {"window": 128}, columns=_QKV),
    "linear": Mixer(LinearAttention, {}, columns=_QKV),
    "taylor": Mixer(TaylorLinearAttention, {}, columns=_QKV),
    "prefix": Mixer(PrefixLinearAttention, {}, columns=(*_QKV, "k_prefix_proj", "v_prefix_proj")),
    "gla": Mixer(GatedLinearAttention, {}, columns=(*_QKV, "g_proj", "gk_proj.up")),
    "delta": Mixer(DeltaNet, {}),
    "gated_delta": Mixer(GatedDeltaNet, {}),
    "kda": Mixer(KimiDeltaAttention, {}),
    "mamba2": Mixer(Mamba2, {}),
    "retention": Mixer(Retention, {}),
    "lightning": Mixer(LightningAttention, {}, from_model=("backend", "layer_idx", "num_layers")),
    "conv": Mixer(BaseConv, {}, from_model=()),
}


def tensor_parallel_plan(layers: Sequence[LayerMixer]) -> dict[str, str]:
    """Return transformers' tensor-parallel plan: it splits every MLP, and the mixers if all of them support it."""
    plan = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    if all(MIXERS[name].columns and not _switched_on(options) & _UNSPLIT for name, options in layers):
        plan |= {f"layers.*.mixer.{weight}": "colwise" for name, _ in layers for weight in MIXERS[name].columns}
        plan["layers.*.mixer.o_proj"] = "rowwise"
    return plan


def _switched_on(options: dict[str, Any]) -> set[str]:
    """Return the names of options with a value other than None, False or ``"channel"``."""
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
    """Return the layer of mixer ``name``; ``options`` override the defaults of its row in ``MIXERS``.

    Args:
        name: name of the mixer.
        hidden_size: model dimension.
        options: arguments of the layer.
        backend: backend of the operators.
        layer_idx: index of the layer in the model, from 0.
        num_layers: number of layers of the model.

    Raises:
        ValueError: the mixer or an option is unknown, or an option has a wrong type or value.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer: expected one of {sorted(MIXERS)}, got {name!r}")
    mixer = MIXERS[name]
    model = {"backend": backend, "layer_idx": layer_idx, "num_layers": num_layers}
    merged = {**{key: model[key] for key in mixer.from_model}, **mixer.options, **options}
    hints = get_type_hints(mixer.layer.__init__)
    known = sorted(hints.keys() - {"hidden_size", "return"})
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{option}: expected one of {known}, got an unknown option")
        if not _has_type(value, hints[option]):
            raise ValueError(f"{option}: expected {getattr(hints[option], '__name__', hints[option])}, got {value!r}")
        if option == "backend" and value not in BACKENDS:
            raise ValueError(f"backend: expected one of {list(BACKENDS)}, got {value!r}")
        if option.endswith("eps") and not value > 0:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{option}: expected a positive number, got {value!r}")
    return mixer.layer(hidden_size, **merged)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; an integer is valid as a float."""
    for candidate in (value, _floats(value)):
        try:
            type_validator("", candidate, hint)
            return True
        except TypeError:
            continue
    return False


def _floats(value: Any) -> Any:
    """Return the value with integers converted to floats, also within lists."""
    if isinstance(value, list | tuple):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def check_mixer(argument: str, mixer: LayerMixer, hidden_size: int) -> None:
    """Check a mixer's options by building its layer on the meta device.

    Raises:
        ValueError: as ``build_mixer``; the message begins with ``argument``.
    """
    try:
        with torch.device("meta"):
            build_mixer(mixer.name, hidden_size, mixer.options)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
