"""Number of parameters and size of the cache of a model, computed without allocating memory."""

import math

import torch

from ...layers.mixer import CacheSpec
from .block import Block
from .configuration import HybridAttnConfig


def blocks(config: HybridAttnConfig) -> list[Block]:
    """Return the model's blocks on the meta device, which allocates no memory."""
    with torch.device("meta"):
        return [Block(config, i) for i in range(len(config.layer_mixers))]


def parameters_of(config: HybridAttnConfig) -> list[int]:
    """Return the number of parameters of each block, and last of the rest of the causal language model.

    The rest are the embeddings, the final norm and, if untied, the head.
    """
    tables = 1 if config.tie_word_embeddings else 2
    rest = tables * config.vocab_size * config.hidden_size + config.hidden_size
    return [*(sum(p.numel() for p in block.parameters()) for block in blocks(config)), rest]


def cache_spec(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> list[CacheSpec]:
    """Return name -> (shape, dtype) of each layer's cache tensors after a prompt.

    Args:
        config: the model's configuration.
        batch_size: number of sequences.
        tokens: length of the prompt of each sequence, in tokens.
        dtype: dtype of the activations.
    """
    return [block.cache_spec(batch_size, tokens, dtype) for block in blocks(config)]


def cache_elements(spec: CacheSpec) -> int:
    """Return the number of floating-point elements in a layer's cache; lengths and other integers do not count."""
    return sum(math.prod(shape) for shape, dtype in spec.values() if dtype.is_floating_point)


def cache_bytes(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the cache of a batch, integers included; arguments as in ``cache_spec``."""
    specs = cache_spec(config, batch_size=batch_size, tokens=tokens, dtype=dtype)
    return sum(math.prod(shape) * kept.itemsize for spec in specs for shape, kept in spec.values())
