"""Rotary position embeddings (RoPE), with linear, Llama 3 and YaRN scaling to longer contexts."""

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.runtime.sequences import sequence_ids
from .mixer import Cache
from .parallel import local_shards


def apply_rotary(x: Tensor, position_ids: Tensor, theta: float, scaling: dict[str, Any] | None = None) -> Tensor:
    """Rotate each head of x by its token's position, with the two halves of D as coordinates, as in Llama.

    Su et al., "RoFormer" (2021), section 3.2.2. Angles are computed in fp32.

    Args:
        x: [B,T,H,D].
        position_ids: [B,T] or [1,T].
        theta, scaling: as in ``rotary_frequencies``.

    Returns:
        [B,T,H,D], in the dtype of x.
    """
    frequencies, factor = rotary_frequencies(x.shape[-1], theta, scaling, x.device)
    angles = (position_ids[..., None].float() * frequencies)[:, :, None]
    cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotary_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Return the rotary frequencies, and the factor by which cosine and sine are multiplied.

    Args:
        dim: head dimension.
        theta: frequency i is theta^(-2i / dim).
        scaling: None, or ``{"rope_type": "linear" | "yarn" | "llama3", ..}`` with the keyword arguments of the function
            of this name below. The names are those of transformers.
        device: device of the frequencies.

    Returns:
        Angles per token in radians, fp32 [dim / 2], and the factor.

    Raises:
        ValueError: theta is not above 1, the type is unknown, or an option is unknown, missing or not positive.
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
        raise ValueError(f"rope_scaling: expected the options of type {kind!r}, got {options} ({error})") from error


def linear(frequencies: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """Divide all frequencies by ``factor``.

    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023).
    """
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
    """Divide low frequencies by ``factor``, keep high ones and interpolate between, as Llama 3.1 does.

    A frequency with at most ``low_freq_factor`` turns within the original context is low, one with at least
    ``high_freq_factor`` turns high. "The Llama 3 Herd of Models" (2024), section 3.4.2, describes the long-context
    training.
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
    """Divide low frequencies by ``factor``, keep high ones, interpolate between, and scale cosine and sine.

    Peng et al., "YaRN" (2023), section 3.2 (linear ramp over the dimensions) and 3.4 (scale of cosine and sine).
    Frequencies of at least ``beta_fast`` turns within the original context stay as they are. Those of at most
    ``beta_slow`` turns are divided by ``factor``. ``truncate`` rounds the ramp's ends outwards to whole dimensions.
    """
    half = len(frequencies)
    ends = [
        half * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)
        for turns in (beta_fast, beta_slow)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # avoids a division by zero; the ramp becomes a step
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
    """Return the position of every token in its sequence, which includes the cached tokens: [B,T] or [1,T]."""
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
