"""Cached keys and values of softmax attention: of all tokens, or of the last ``window`` in a ring buffer.

The cache holds ``keys`` [N,S,H,D], ``values`` [N,S,H,V] and ``lengths`` [N], the number of tokens of each sequence so
far. A ring buffer stores position p in slot p % window. A full cache stores it in slot p. With a capacity, S is the
capacity. Without one, S starts at the longest prompt and grows to multiples of GROWTH slots.
"""

import torch
from torch import Tensor

from ..kernels.runtime.checks import reads_values
from ..kernels.runtime.sequences import sequence_ids, sequence_slices
from .mixer import Cache

GROWTH = 256  # slots


def past(cache: Cache, name: str, row: int, keep: int | None) -> Tensor:
    """Return the last ``keep`` cached keys or values of sequence ``row``, or all if None: [n,H,D], oldest first."""
    length, slots = int(cache["lengths"][row]), cache[name].shape[1]
    first = 0 if keep is None else max(length - keep, 0)
    return cache[name][row, torch.arange(first, length, device=cache[name].device) % slots]


def append(cache: Cache, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, skipped: int = 0) -> None:
    """Store the keys and values of new tokens, and add to the lengths.

    Args:
        cache: the layer's cache, updated in place.
        k: [B,T,H,D], or [1,T,H,D] with ``cu_seqlens``.
        v: [B,T,H,V], or [1,T,H,V] with ``cu_seqlens``.
        cu_seqlens: integer offsets [N+1] of packed sequences.
        window: slots of a ring buffer; None for a full cache.
        skipped: number of first tokens, all outside of the window, that k and v leave out. Only for an empty cache.

    Raises:
        ValueError: a sequence has more tokens than the cache's capacity.
    """
    rows, tokens = (k.shape[0], k.shape[1]) if cu_seqlens is None else (cu_seqlens.numel() - 1, k.shape[1])
    longest = tokens
    if cu_seqlens is not None and cache.capacity is None and window is None:
        longest = max((s.stop - s.start for s in sequence_slices(cu_seqlens)), default=0)
    if "keys" not in cache:
        cache["lengths"] = torch.full((rows,), skipped, dtype=torch.long, device=k.device)
        for name, x in (("keys", k), ("values", v)):
            cache[name] = x.new_zeros(rows, window or cache.capacity or longest, *x.shape[2:])
    lengths, slots = cache["lengths"], cache["keys"].shape[1]
    if window is None and cache.capacity is None:
        cache.tokens += longest
        slots = _grow(cache, cache.tokens)
    if cu_seqlens is None:
        added, offset = tokens, torch.arange(tokens, device=k.device)
        row, position = torch.arange(rows, device=k.device)[:, None], lengths[:, None] + offset
        if window is not None:  # more tokens than slots: store the last ones
            k, v, position = k[:, -slots:], v[:, -slots:], position[:, -slots:] % slots
    else:
        added = cu_seqlens.long().diff()
        number, offset = sequence_ids(cu_seqlens, tokens), torch.arange(tokens, device=k.device)
        kept = number < rows
        if window is not None:
            kept &= offset >= torch.cat((cu_seqlens[1:].long(), offset.new_zeros(1)))[number] - slots
        row, offset, k, v = number[kept], offset[kept], k[0, kept], v[0, kept]
        position = (lengths - cu_seqlens[:-1].long())[row] + offset
        position = position if window is None else position % slots
    if window is None and reads_values(position, False) and bool((position >= slots).any()):
        raise ValueError(f"cache: expected at most {slots} tokens per sequence, got {int(position.max()) + 1}")
    for name, x in (("keys", k), ("values", v)):
        cache[name] = _write(cache[name], (row, position), x)
    cache["lengths"] = lengths + added if torch.is_grad_enabled() else lengths.add_(added)


def _write(slots: Tensor, index: tuple[Tensor, ...], new: Tensor) -> Tensor:
    return slots.index_put(index, new) if torch.is_grad_enabled() else slots.index_put_(index, new.to(slots.dtype))


def _grow(cache: Cache, needed: int) -> int:
    """Allocate at least ``needed`` slots per sequence, and return the number of slots."""
    if needed > cache["keys"].shape[1]:
        slots = -(-needed // GROWTH) * GROWTH
        for name in ("keys", "values"):
            old = cache[name]
            cache[name] = torch.cat((old, old.new_zeros(old.shape[0], slots - old.shape[1], *old.shape[2:])), 1)
    return cache["keys"].shape[1]
