"""Rotary position embeddings, and the rules that stretch them over longer contexts."""

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.runtime.sequences import sequence_ids
from .mixer import Cache
from .parallel import local_shards


def apply_rotary(x: Tensor, position_ids: Tensor, theta: float, scaling: dict[str, Any] | None = None) -> Tensor:
    """Rotate x [B,T,H,D] by its positions [B,T] or [1,T], the halves of D being the two coordinates (as Llama does).

    Su et al., "RoFormer" (2021), section 3.2.2; scaling as in ``rotary_frequencies``. Angles are computed in fp32.
    """
    frequencies, factor = rotary_frequencies(x.shape[-1], theta, scaling, x.device)
    angles = (position_ids[..., None].float() * frequencies)[:, :, None]
    cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotary_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Angle per token [dim / 2] in fp32, and the factor of cosine and sine.

    Args:
        dim: of a head.
        theta: frequency i is theta^(-2i / dim).
        scaling: None, or ``{"rope_type": "linear" | "yarn" | "llama3", ..}`` with the options of that function below,
            which are transformers' names.

    Raises:
        ValueError: theta is not above 1; another type, or an option that it does not have, that is missing or no
            positive number.
    """
    if not theta > 1:
        raise ValueError(f"rope_theta: expected more than 1, got {theta!r}")
    half = dim // 2
    frequencies = theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else scaling
    if not isinstance(scaling, dict) or kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected a dict with a rope_type of {sorted(SCALINGS)}, got {kind!r}")
    options = {name: value for name, value in scaling.items() if name != "rope_type"}
    for name, value in options.items():
        if value is not None and not value > 0 and not isinstance(value, bool):
            raise ValueError(f"rope_scaling: expected a positive {name}, got {value!r}")
    try:
        return SCALINGS[kind](frequencies, theta, **options)
    except TypeError as error:
        raise ValueError(f"rope_scaling of type {kind!r}: {error}") from error


def linear(frequencies: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """All angles over ``factor``. Chen et al., "Extending Context Window .. via Positional Interpolation" (2023)."""
    return frequencies / factor, 1.0


def llama3(
    frequencies: Tensor,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:
    """Slow angles over ``factor``, fast ones as they are, a blend between: by turns in the original context.

    The rule of Llama 3.1; "The Llama 3 Herd of Models" (2024), section 3.4.2, has the long-context training.
    """
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def yarn(
    frequencies: Tensor,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """Peng et al., "YaRN" (2023), section 3.2 (a ramp over the dimensions) and 3.4 (cosine and sine are scaled).

    Angles of at least ``beta_fast`` turns in the original context stay, those of at most ``beta_slow`` are taken over
    ``factor``; ``truncate`` rounds the ends of the ramp outwards to whole dimensions.
    """
    half = len(frequencies)
    ends = [
        half * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)
        for turns in (beta_fast, beta_slow)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # a step
    stretched = ((torch.arange(half, device=frequencies.device) - low) / (high - low)).clamp(0, 1)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _yarn_factor(factor, mscale) / _yarn_factor(factor, mscale_all_dim)
    elif attention_factor is None:
        attention_factor = _yarn_factor(factor, 1.0)
    return frequencies * (1 - stretched + stretched / factor), attention_factor


def _yarn_factor(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


SCALINGS = {"linear": linear, "llama3": llama3, "yarn": yarn}


def token_positions(hidden_states: Tensor, cu_seqlens: Tensor | None, cache: Cache | None) -> Tensor:
    """Position [B,T] of every token in its sequence, kept tokens counted."""
    shards = local_shards(hidden_states, cu_seqlens, cache)
    if shards is not None:
        return shards.positions
    tokens = hidden_states.shape[1]
    at = torch.arange(tokens, device=hidden_states.device)[None]
    kept = cache["lengths"] if cache is not None and "lengths" in cache else None
    if cu_seqlens is None:
        return at if kept is None else at + kept[:, None]
    from_start = (cu_seqlens[:-1] if kept is None else cu_seqlens[:-1] - kept).long()
    number = sequence_ids(cu_seqlens, tokens)
    return at - torch.cat((from_start, cu_seqlens[-1:].long()))[number]
