"""Configurations of published models by name: ``PRESETS[name](**fields)`` constructs one, and fields override it."""

from collections.abc import Callable
from functools import partial

from .decoder import HybridAttnConfig
from .families import (
    HybridAttnBasedConfig,
    HybridAttnDeltaNetConfig,
    HybridAttnGatedDeltaNetConfig,
    HybridAttnGLAConfig,
    HybridAttnJRTConfig,
    HybridAttnKDAConfig,
)
from .families.based import stack

_BASED_1B3 = [1, 6, 11, 16, 21, 27, 33]
_GLA_340M = {"gla": {"num_heads": 4}, "full": {"num_heads": 16}}


def _mamba2(hidden_size: int, num_layers: int) -> Callable[..., HybridAttnConfig]:
    """Return the constructor of a Mamba-2 model with GPT-NeoX's vocabulary, rounded up to a multiple of 16."""
    return partial(
        HybridAttnConfig,
        vocab_size=50288,
        hidden_size=hidden_size,
        mixers="1 mamba2",
        num_hidden_layers=num_layers,
        mlp="none",
        rms_norm_eps=1e-5,
    )


PRESETS: dict[str, Callable[..., HybridAttnConfig]] = {
    # Yang et al., "Gated Linear Attention Transformers" (2024), section 5.1
    "gla_340m": partial(HybridAttnGLAConfig, hidden_size=1024, tie_word_embeddings=True),
    "gla_1b3": partial(HybridAttnGLAConfig, hidden_size=2048, tie_word_embeddings=True),
    # Yang et al., "Parallelizing Linear Transformers with the Delta Rule .." (2024), section 4: the shape of the
    # released fla-hub/delta_net-1.3B-100B, whose head is not tied and which therefore has 1.37e9 parameters
    "delta_net_1b3": partial(HybridAttnDeltaNetConfig, tie_word_embeddings=True),
    # Yang et al., "Gated Delta Networks" (2025), section 4: GatedDeltaNet_1.3B in lit_gpt/config.py of the
    # paper's code, NVlabs/GatedDeltaNet
    "gated_delta_net_1b3": partial(
        HybridAttnGatedDeltaNetConfig,
        hidden_size=2400,
        num_hidden_layers=16,
        intermediate_size=5888,
        num_heads=9,
        head_dim=200,
        norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    # Kimi Delta Attention (Kimi Team, "Kimi Linear", 2025) at the width and depth of delta_net_1b3, which are the
    # defaults of flash-linear-attention
    "kda_1b3": partial(HybridAttnKDAConfig, tie_word_embeddings=True),
    # Dao and Gu, "Transformers are SSMs" (2024), section 9.2: state-spaces/mamba2-130m, -370m, -780m and -2.7b
    "mamba2_130m": _mamba2(768, 24),
    "mamba2_370m": _mamba2(1024, 48),
    "mamba2_780m": _mamba2(1536, 48),
    "mamba2_2b7": _mamba2(2560, 64),
    # Arora et al., "Simple linear attention language models .." (BASED, 2024), table 1, and their attention baselines
    "based_360m": HybridAttnBasedConfig,
    "based_1b3": partial(
        HybridAttnBasedConfig, hidden_size=1792, intermediate_size=3584, mixers=stack(36, "taylor", _BASED_1B3)
    ),
    "transformer_360m": partial(
        HybridAttnConfig,
        vocab_size=50264,
        hidden_size=1024,
        intermediate_size=2816,
        mixers="1 full",
        num_hidden_layers=24,
        mixer_options={"full": {"num_heads": 16}},
    ),
    "transformer_1b3": partial(
        HybridAttnConfig,
        vocab_size=50264,
        hidden_size=1680,
        intermediate_size=4608,
        mixers="1 full",
        num_hidden_layers=36,
        mixer_options={"full": {"num_heads": 24}},
    ),
    # Arora et al., "Just read twice" (JRT-RNN, 2024)
    "jrt_360m": HybridAttnJRTConfig,
    "jrt_1b3": partial(
        HybridAttnJRTConfig, hidden_size=1792, intermediate_size=3584, mixers=stack(36, "prefix", _BASED_1B3)
    ),
    # Constant decays, gates per head and softmax layers at the width and depth of gla_340m
    "retnet_340m": partial(
        HybridAttnConfig,
        hidden_size=1024,
        intermediate_size=1408,
        mixers="1 retention",
        num_hidden_layers=24,
        mixer_options={"retention": {"num_heads": 4}},
    ),
    "lightning_340m": partial(
        HybridAttnConfig,
        hidden_size=1024,
        intermediate_size=2496,
        mixers="1 lightning",
        num_hidden_layers=24,
        mixer_options={"lightning": {"num_heads": 8}},
    ),
    "head_gated_340m": partial(
        HybridAttnConfig,
        hidden_size=1024,
        intermediate_size=2816,
        mixers="1 gla",
        num_hidden_layers=24,
        mixer_options={"gla": {"num_heads": 4, "gate_per": "head", "conv_size": 4}},
    ),
    "hybrid_340m": partial(
        HybridAttnConfig,
        hidden_size=1024,
        intermediate_size=2816,
        mixers="1 full : 7 gla",
        num_hidden_layers=24,
        mixer_options=_GLA_340M,
    ),
}

# Published numbers of parameters, and published state sizes of a sequence, in elements or in bytes of 16-bit numbers.
# BASED's state sizes count both halves of the symmetric features (273 instead of 153 for d' = 16), and three cached
# inputs of a convolution instead of two.
PUBLISHED: dict[str, tuple[str, str]] = {
    "gla_340m": ("340M", ""),
    "gla_1b3": ("1.3B", ""),
    "delta_net_1b3": ("1.3B", ""),
    "gated_delta_net_1b3": ("1.3B", ""),
    "mamba2_130m": ("130M", ""),
    "mamba2_370m": ("370M", ""),
    "mamba2_780m": ("780M", ""),
    "mamba2_2b7": ("2.7B", ""),
    "based_360m": ("360M", "2.83M"),
    "based_1b3": ("1.35B", "6.90M"),
    "transformer_360m": ("360M", "98 kB a token"),
    "transformer_1b3": ("1.33B", "242 kB a token"),
    "jrt_360m": ("360M", ""),
    "jrt_1b3": ("1.3B", ""),
}
