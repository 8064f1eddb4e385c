"""Published and handy shapes, as keyword arguments of ``HybridAttnConfig``."""

from typing import Any

_GLA = {"gla": {"num_heads": 4, "gate_rank": 16, "gate_normalizer": 16.0}}

PRESETS: dict[str, dict[str, Any]] = {
    # Yang et al., "Gated Linear Attention Transformers" (2024), section 5.1
    "gla_340m": {"hidden_size": 1024, "intermediate_size": 2816, "mixers": ["gla"] * 24, "mixer_options": _GLA},
    "gla_1b3": {"hidden_size": 2048, "intermediate_size": 5632, "mixers": ["gla"] * 24, "mixer_options": _GLA},
    "transformer_340m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "mixers": ["full"] * 24,
        "mixer_options": {"full": {"num_heads": 16}},
    },
    "hybrid_340m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "mixers": ["full", *["gla"] * 7] * 3,
        "mixer_options": {**_GLA, "full": {"num_heads": 16}},
    },
}
