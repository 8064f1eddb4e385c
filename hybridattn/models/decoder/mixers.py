"""The mixers a configuration can name: name -> layer and the options it starts from. A new mixer is one row here."""

from typing import Any, NamedTuple

from ...layers import (
    BaseConv,
    GatedLinearAttention,
    LinearAttention,
    SoftmaxAttention,
    TaylorLinearAttention,
    TokenMixer,
)


class Mixer(NamedTuple):
    layer: type[TokenMixer]
    options: dict[str, Any]
    has_backend: bool = True  # takes the model's ``backend``


MIXERS = {
    "full": Mixer(SoftmaxAttention, {}),
    "window": Mixer(SoftmaxAttention, {"window": 128}),
    "linear": Mixer(LinearAttention, {}),
    "taylor": Mixer(TaylorLinearAttention, {}),
    "gla": Mixer(GatedLinearAttention, {}),
    "conv": Mixer(BaseConv, {}, has_backend=False),
}


def build_mixer(name: str, hidden_size: int, options: dict[str, Any], backend: str | None = None) -> TokenMixer:
    """The layer of mixer ``name`` with ``options`` over its own.

    Raises:
        ValueError: unknown mixer, or an option it does not have or cannot take.
    """
    if name not in MIXERS:
        raise ValueError(f"mixers: expected names from {sorted(MIXERS)}, got {name!r}")
    mixer = MIXERS[name]
    merged = {**({"backend": backend} if mixer.has_backend else {}), **mixer.options, **options}
    try:
        return mixer.layer(hidden_size, **merged)
    except TypeError as error:
        raise ValueError(f"mixer_options[{name!r}]: {error}") from error
