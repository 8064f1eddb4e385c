"""Cache layers for transformers' DynamicCache and StaticCache that store the states of token mixers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from ...layers.mixer import Cache as MixerCache
from .configuration import CACHE_LAYER_TYPE


class MixerCacheLayer(CacheLayerMixin):
    """One layer of a ``DynamicCache``: the tensors that its mixer reads and writes, one row per sequence.

    ``DynamicCache(config=config)`` constructs these layers for the name in ``config.layer_types``.

    Attributes:
        tensors: the mixer's cache.
        cumulative_length: number of tokens of a row, which includes padding, as ``generate`` expects. The model
            advances it.
    """

    _layer_type = CACHE_LAYER_TYPE
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.tensors = MixerCache()
        self.cumulative_length: Any = 0  # a tensor in a static cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("lazy_initialization: expected no call (mixers allocate their tensors)")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("update: expected no call (mixers read and write `tensors`)")

    def advance(self, tokens: int) -> None:
        """Add ``tokens`` to ``cumulative_length``."""
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _map(self, change) -> None:
        self.tensors.update({name: change(x) for name, x in self.tensors.items()})

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise NotImplementedError("cache: expected one on the model's device, got an offloaded cache")

    def reset(self) -> None:
        self.__init__()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove: expected 0 (a recurrent state cannot be rolled back), got {tokens_to_remove}"
            )


class StaticMixerCacheLayer(MixerCacheLayer):
    """One layer of ``StaticCache(config, max_cache_len)``: shapes and addresses of its tensors never change.

    So a compiled decoding step remains valid. The first call of the model allocates all tensors and must not be
    compiled.
    """

    _layer_type = None
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__()
        self.tensors = MixerCache(max_cache_len)
        self.cumulative_length = torch.zeros(
            (), dtype=torch.long
        )  # torch.compile would treat a Python number as a constant

    def advance(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not torch.compiler.is_compiling():
            for x in (self.cumulative_length, *self.tensors.values()):
                torch._dynamo.mark_static_address(x)  # so that CUDA graphs use the addresses without copies

    def get_max_length(self) -> int:
        return self.tensors.capacity or -1

    def reset(self) -> None:
        self.__init__(self.get_max_length())


STATIC_LAYER_TYPE_MAPPING[CACHE_LAYER_TYPE] = StaticMixerCacheLayer


def mixer_caches(cache: Cache) -> list[MixerCacheLayer]:
    """Return the layers of a cache that ``check_cache`` accepts, typed."""
    return cache.layers  # pyright: ignore[reportReturnType]


def check_cache(cache: Cache, layers: int) -> None:
    """Check that the cache was constructed from the configuration of a model with ``layers`` layers.

    Raises:
        ValueError: it has another number or another type of layers, or it is an offloaded cache.
    """
    if len(cache.layers) != layers or not all(isinstance(layer, MixerCacheLayer) for layer in cache.layers):
        raise ValueError(
            f"past_key_values: expected DynamicCache(config=model.config) with {layers} layers, got {cache!r}"
        )
    if getattr(cache, "offloading", False):
        raise ValueError("past_key_values: expected a cache on the model's device, got an offloaded cache")


def allocated_bytes(cache: Cache) -> int:
    """Return the allocated bytes of all tensors in the cache; a storage that tensors share counts once."""
    tensors = (x for layer in mixer_caches(cache) for x in layer.tensors.values())
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
