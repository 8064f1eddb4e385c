"""Base class of token mixers, the cache of a mixer, and helper functions that the mixers share."""

import torch
from torch import Tensor, nn

from ..kernels.runtime.checks import check_shape, check_tensors
from ..kernels.runtime.sequences import check_offsets
from .parallel.context import refuse_if_sharded

INPUT_CONV = "input_conv"  # name of a decoder block's own convolution in the cache of its mixer
CacheSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


class Cache(dict[str, Tensor]):
    """State of one layer after the tokens so far: tensors by name, one row per sequence. A new cache is empty.

    A cache belongs to one layer. Another layer of the same class and sizes would accept it and compute wrong results.

    Attributes:
        capacity: fixed number of tokens per sequence for keys and values, allocated at once. If None,
            they grow.
        tokens: number of tokens of the longest sequence, on the host so that no step reads a tensor. Only counted if
            keys and values grow.
    """

    def __init__(self, capacity: int | None = None):
        super().__init__()
        self.capacity = capacity if capacity is None else check_positive("capacity", capacity)
        self.tokens = 0


class TokenMixer(nn.Module):
    """Base class of layers that mix the tokens of a sequence: [B,T,hidden_size] -> [B,T,hidden_size].

    Attributes:
        hidden_size: model dimension.
        state_dtype: dtype of recurrent states in the cache; None for that of the computation, fp32, or fp64 for fp64
            inputs.
        growing: names of cache tensors whose second dimension depends on the number of tokens.
        shares_cache: whether another layer stores its tensors in the same cache.
    """

    state_dtype: torch.dtype | None = None
    growing: tuple[str, ...] = ()
    shares_cache = False

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = check_positive("hidden_size", hidden_size)

    def check_call(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> None:
        """Check the arguments of ``forward``.

        Raises:
            ValueError: a wrong type, shape or dtype, or a cache of other sequences or of another layer.
        """
        check_shape({"hidden_size": self.hidden_size}, "hidden_states", hidden_states, "B T hidden_size")
        check_tensors("hidden_states", hidden_states=hidden_states)
        batch, tokens = hidden_states.shape[:2]
        if cu_seqlens is not None:
            check_offsets("cu_seqlens", cu_seqlens, batch)
        if position_ids is not None:
            rows = 1 if isinstance(position_ids, Tensor) and position_ids.shape[:1] == (1,) else batch
            check_shape({"B": rows, "T": tokens}, "position_ids", position_ids, "B T")
            if position_ids.is_floating_point():
                raise ValueError(f"position_ids: expected integers, got {position_ids.dtype}")
        if cache is not None:
            self.check_cache(cache, batch if cu_seqlens is None else cu_seqlens.numel() - 1, hidden_states.dtype)

    def check_cache(self, cache: Cache, rows: int, dtype: torch.dtype) -> None:
        """Check that a cache is empty, or holds the tensors of this layer for ``rows`` sequences."""
        if not isinstance(cache, Cache):
            raise ValueError(f"cache: expected a hybridattn.Cache or None, got {type(cache).__name__}")
        spec = self.cache_spec(rows, 1, dtype)
        if not (cache.keys() & spec.keys() if self.shares_cache else cache.keys() - {INPUT_CONV}):
            return
        refuse_if_sharded("cache: expected an empty cache, got one that holds tokens")
        if not spec.keys() <= cache.keys():
            raise ValueError(f"cache: expected one of this layer, with {sorted(spec)}, got one with {sorted(cache)}")
        for name, (shape, _) in spec.items():
            held = cache[name].shape
            if held[0] != rows:
                raise ValueError(f"cache: expected a cache of {rows} sequences, got {held[0]}")
            first = 2 if name in self.growing else 1
            if held[first:] != shape[first:]:
                raise ValueError(f"cache: expected {name} of shape {list(shape)}, of this layer, got {list(held)}")

    def cache_spec(self, batch_size: int, tokens: int, dtype: torch.dtype) -> CacheSpec:
        """Return the shape and dtype of each cache tensor after a prompt, by the tensor's name.

        Args:
            batch_size: number of sequences.
            tokens: length of the prompt of each sequence, in tokens.
            dtype: dtype of the activations.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            hidden_states: [B,T,hidden_size].
            cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1). Tokens past the last offset
                belong to no sequence.
            position_ids: positions [B,T] of the tokens in their sequences, for mixers that use positions. By default
                the first new token's position is the number of cached tokens.
            cache: state of earlier tokens, ``Cache()`` for the first call. The layer updates it. Its tensors have one
                row per sequence (B, or N with ``cu_seqlens``).

        Returns:
            [B,T,hidden_size].

        Raises:
            ValueError: an argument has a wrong shape, dtype or value.
        """
        raise NotImplementedError


def store(cache: Cache, name: str, value: Tensor) -> None:
    """Store ``value`` in the cache, in place if ``name`` exists: CUDA graphs need a constant address.

    While autograd records, the function replaces the tensor: the backward pass may need the old one.
    """
    if name in cache and not torch.is_grad_enabled():
        cache[name].copy_(value)
    else:
        cache[name] = value.clone()  # a view would keep the larger tensor behind it in memory


def read_state(cache: Cache, name: str) -> Tensor:
    """Return the cached recurrent state: the tensor itself if it is fp32 or fp64, else a copy in fp32."""
    state = cache[name]
    return state if state.dtype in (torch.float32, torch.float64) else state.float()


def write_state(cache: Cache, name: str, state: Tensor, dtype: torch.dtype | None) -> None:
    """Store a recurrent state in the cache, in ``dtype`` if given."""
    if state is not cache.get(name):  # a step updates the cached tensor in place
        store(cache, name, state if dtype is None else state.to(dtype))


def is_step(hidden_states: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the call has one new token per row, so that the in-place ``_step`` operators can run it."""
    return hidden_states.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()


def apply_norm(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x), computed in the dtype of the norm's weights.

    Under autocast x has another dtype than the weights, and torch's norms of mixed dtypes are slow.
    """
    return norm(x if norm.weight is None else x.to(norm.weight.dtype))


def check_positive(name: str, value: int) -> int:
    """Return ``value``, or raise a ValueError that names the option if it is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def head_size(hidden_size: int, num_heads: int, fraction: int = 1) -> int:
    """Return the head dimension: ``hidden_size / fraction``, divided evenly among ``num_heads`` heads."""
    if check_positive("hidden_size", hidden_size) % (fraction * check_positive("num_heads", num_heads)):
        shared = (
            f"hidden_size {hidden_size}" if fraction == 1 else f"hidden_size / {fraction} = {hidden_size / fraction:g}"
        )
        raise ValueError(f"num_heads: expected a divisor of {shared}, got {num_heads}")
    return hidden_size // fraction // num_heads
