"""What a model keeps per sequence, by formula: nothing is allocated."""

import math

import torch

from ...layers.mixer import CacheSpec
from .configuration import HybridAttnConfig
from .modeling import DecoderLayer


def cache_spec(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> list[CacheSpec]:
    """Per layer, name -> (shape, dtype) of what it keeps after a prompt of ``tokens``, activations in ``dtype``."""
    with torch.device("meta"):
        layers = [DecoderLayer(config, i) for i in range(len(config.mixers))]
    return [layer.cache_spec(batch_size, tokens, dtype) for layer in layers]


def cache_elements(spec: CacheSpec) -> int:
    """Numbers kept by a layer; lengths and other integers are no state."""
    return sum(math.prod(shape) for shape, dtype in spec.values() if dtype.is_floating_point)


def cache_bytes(config: HybridAttnConfig, *, batch_size: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a batch keeps after a prompt of ``tokens``, activations in ``dtype``, integers included."""
    specs = cache_spec(config, batch_size=batch_size, tokens=tokens, dtype=dtype)
    return sum(math.prod(shape) * kept.itemsize for spec in specs for shape, kept in spec.values())
