"""Base class of token mixers, the cache of a mixer, and helper functions that the mixers share."""

import torch
from torch import Tensor, nn

from ..kernels.runtime.checks import check_shape
from .parallel.context import refuse

CacheSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


class Cache(dict[str, Tensor]):
    """State of one layer after the tokens so far: tensors by name, one row per sequence. A new cache is empty.

    A cache belongs to one layer. Another layer of the same kind would accept it and compute wrong results.

    Attributes:
        capacity: fixed number of tokens per sequence for keys and values, allocated at once. If None,
            they grow.
        tokens: number of tokens of the longest sequence, on the host so that no step reads a tensor. Only counted if
            keys and values grow.
    """

    def __init__(self, capacity: int | None = None):
        super().__init__()
        self.capacity = capacity
        self.tokens = 0


class TokenMixer(nn.Module):
    """Base class of layers that mix the tokens of a sequence: [B,T,hidden_size] -> [B,T,hidden_size].

    Attributes:
        hidden_size: model dimension.
        state_dtype: dtype of recurrent states in the cache; None for fp32, the dtype of the computation.
    """

    state_dtype: torch.dtype | None = None

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = positive("hidden_size", hidden_size)

    def check_hidden_states(self, hidden_states: Tensor) -> None:
        """Check the shape of a layer's input.

        Raises:
            ValueError: it is not [B,T,hidden_size].
        """
        check_shape({"hidden_size": self.hidden_size}, "hidden_states", hidden_states, "B T hidden_size")

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
            cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
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


def check_rows(cache: Cache | None, name: str, rows: int) -> None:
    """Check that a cache with tensor ``name`` has ``rows`` sequences; under sequence_parallel, that it is empty."""
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache: expected a hybridattn.layers.Cache or None, got {type(cache).__name__}")
    if cache is not None and name in cache:
        refuse("cache: expected an empty cache, got one that holds tokens")
    if cache is not None and name in cache and cache[name].shape[0] != rows:
        raise ValueError(f"cache: expected a cache of {rows} sequences, got {cache[name].shape[0]}")


def kept_state(cache: Cache, name: str) -> Tensor:
    """Return the cached recurrent state: the tensor itself if it is fp32 or fp64, else a copy in fp32."""
    state = cache[name]
    return state if state.dtype in (torch.float32, torch.float64) else state.float()


def keep_state(cache: Cache, name: str, state: Tensor, dtype: torch.dtype | None) -> None:
    """Store a recurrent state in the cache, in ``dtype`` if given."""
    if state is not cache.get(name):  # a step updates the cached tensor in place
        store(cache, name, state if dtype is None else state.to(dtype))


def is_step(hidden_states: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the call has one new token per row, so that the in-place ``_step`` operators can run it."""
    return hidden_states.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()


def normalize(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x), computed in the dtype of the norm's weights.

    Under autocast x has another dtype than the weights, and torch's norms of mixed dtypes are slow.
    """
    return norm(x if norm.weight is None else x.to(norm.weight.dtype))


def positive(name: str, value: int) -> int:
    """Return ``value``, or raise a ValueError that names the option if it is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def head_size(hidden_size: int, num_heads: int, fraction: int = 1) -> int:
    """Return the head dimension: ``hidden_size / fraction``, divided evenly among ``num_heads`` heads."""
    if positive("hidden_size", hidden_size) % (fraction * positive("num_heads", num_heads)):
        shared = (
            f"hidden_size {hidden_size}" if fraction == 1 else f"hidden_size / {fraction} = {hidden_size / fraction:g}"
        )
        raise ValueError(f"num_heads: expected a divisor of {shared}, got {num_heads}")
    return hidden_size // fraction // num_heads
