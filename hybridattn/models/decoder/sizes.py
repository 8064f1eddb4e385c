"""What a model keeps per sequence, by formula: nothing is allocated."""

import math

import torch

from ...layers.mixer import CacheSpec
from .block import Block
from .configuration import HybridAttnConfig


def blocks(config: HybridAttnConfig) -> list[Block]:
    """The model's blocks without memory, on the meta device."""
    with torch.device("meta"):
        return [Block(config, i) for i in range(len(config.layer_mixers))]


def parameters_of(config: HybridAttnConfig) -> list[int]:
    """Parameters of each block, then of the causal language model around them: embeddings, norm, and head if untied."""
    tables = 1 if config.tie_word_embeddings else 2
    rest = tables * config.vocab_size * config.hidden_size + config.hidden_size
    return [*(sum(p.numel() for p in block.parameters()) for block in blocks(config)), rest]


def cache_spec(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> list[CacheSpec]:
    """Per layer, name -> (shape, dtype) of what it keeps after a prompt of ``tokens``, activations in ``dtype``."""
    return [block.cache_spec(batch_size, tokens, dtype) for block in blocks(config)]


def cache_elements(spec: CacheSpec) -> int:
    """Numbers kept by a layer; lengths and other integers are no state."""
    return sum(math.prod(shape) for shape, dtype in spec.values() if dtype.is_floating_point)


def cache_bytes(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a batch keeps after a prompt of ``tokens``, activations in ``dtype``, integers included."""
    specs = cache_spec(config, batch_size=batch_size, tokens=tokens, dtype=dtype)
    return sum(math.prod(shape) * kept.itemsize for spec in specs for shape, kept in spec.values())
