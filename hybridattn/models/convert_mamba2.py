"""Read Mamba-2 checkpoints of transformers (``model_type: mamba2``) for ``hybridattn convert``."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Mamba2Config

from .decoder import HybridAttnConfig
from .decoder.configuration import TRANSFORMERS_FIELDS, generation_fields

NAMES = {
    r"^backbone\.embeddings?\.": "model.embed_tokens.",
    r"^backbone\.norm_f\.": "model.norm.",
    r"^backbone\.(layers\.\d+)\.norm\.": r"model.\1.input_layernorm.",
    r"^backbone\.": "model.",
    r"\.mixer\.conv1d\.": ".mixer.conv.",
    r"\.mixer\.(A_log|dt_bias)$": r".mixer.decay.\1",
    r"\.mixer\.norm\.weight$": ".mixer.norm_weight",
}
# Fields whose other values are another model; the first value is the default.
EXPECTED = {"hidden_act": ("silu", "swish"), "rms_norm": (True,)}
# Fields of older files that transformers does not read.
IGNORED = {"norm_before_gate", "intermediate_size"}


def from_mamba2(
    source: Path, stored: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[HybridAttnConfig, dict[str, Tensor]]:
    """Return the configuration and the renamed weights of a Mamba-2 checkpoint.

    ``residual_in_fp32`` is ignored, since the residual stream has the dtype of the weights here. So are the fields of
    initial values (``rescale_prenorm_residual``, ``time_step_min`` ..) and ``chunk_size``. The output norm has
    ``n_groups`` groups, as in the paper's code and in transformers 5.23; in 5.17 it had one.

    Args:
        source: folder with config.json.
        stored: the fields in this file.
        weights: the file's weights by name.

    Raises:
        ValueError: a field is unknown or has an unsupported value.
    """
    known = {each.name for each in fields(Mamba2Config)} | TRANSFORMERS_FIELDS | generation_fields()
    if unknown := sorted(stored.keys() - known - EXPECTED.keys() - IGNORED):
        raise ValueError(f"{unknown[0]}: expected fields of transformers' Mamba2Config, got an unknown name")
    for name, expected in EXPECTED.items():
        if (got := stored.get(name, expected[0])) not in expected:
            raise ValueError(f"{name}: expected {expected[0]!r} in a Mamba-2 model, got {got!r}")
    try:
        theirs = Mamba2Config.from_pretrained(source)
    except StrictDataclassError as error:
        raise ValueError(f"source: expected fields of a Mamba-2 model, got an error: {error}") from error
    options = {
        "num_heads": theirs.num_heads,
        "head_dim": theirs.head_dim,
        "state_size": theirs.state_size,
        "num_groups": theirs.n_groups,
        "conv_size": theirs.conv_kernel,
        "conv_bias": theirs.use_conv_bias,
        "bias": theirs.use_bias,
        "norm_eps": theirs.layer_norm_epsilon,
    }
    renamed = {_renamed(name): x for name, x in weights.items()}
    embeddings = renamed.get("model.embed_tokens.weight")
    if tuple(theirs.time_step_limit) != (0.0, float("inf")):  # the default; JSON of other programs has no infinity
        options["dt_limit"] = list(theirs.time_step_limit)
    config = HybridAttnConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        mixers=["mamba2"] * theirs.num_hidden_layers,
        mixer_options={"mamba2": options},
        mlp="none",
        rms_norm_eps=theirs.layer_norm_epsilon,
        tie_word_embeddings=theirs.tie_word_embeddings,
        pad_token_id=theirs.pad_token_id,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        dtype=None if embeddings is None else embeddings.dtype,
    )
    return config, renamed


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
