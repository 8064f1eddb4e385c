"""Keys and values kept for softmax attention: all of them, or the last ``window`` in a ring buffer.

The cache holds ``keys`` [N,S,H,D], ``values`` [N,S,H,V] and ``lengths`` [N], the tokens each sequence has had. A ring
buffer keeps position p in slot p % window; a full cache keeps it in slot p and is allocated to the cache's capacity, or
to the longest prompt and grows in steps of GROWTH slots.
"""

import torch
from torch import Tensor

from ..kernels.runtime.checks import reads_values
from ..kernels.runtime.sequences import sequence_ids, sequence_slices
from .mixer import Cache

GROWTH = 256


def past(cache: Cache, name: str, row: int, keep: int | None) -> Tensor:
    """The last ``keep`` (None: all) kept keys or values [n,H,D] of a sequence, oldest first."""
    length, slots = int(cache["lengths"][row]), cache[name].shape[1]
    first = 0 if keep is None else max(length - keep, 0)
    return cache[name][row, torch.arange(first, length, device=cache[name].device) % slots]


def append(cache: Cache, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, skipped: int = 0) -> None:
    """Keep new keys [B,T,H,D] and values [B,T,H,V], or those of a packed row [1,T,..].

    Of the tokens of an empty cache the first ``skipped``, all outside of the window, may be left out.
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
        if window is not None:  # of more tokens than slots the last ones stay
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
        cache[name] = _put(cache[name], (row, position), x)
    cache["lengths"] = lengths + added if torch.is_grad_enabled() else lengths.add_(added)


def _put(kept: Tensor, index: tuple[Tensor, ...], new: Tensor) -> Tensor:
    return kept.index_put(index, new) if torch.is_grad_enabled() else kept.index_put_(index, new.to(kept.dtype))


def _grow(cache: Cache, needed: int) -> int:
    """Make room for so many tokens of every sequence; how many there is room for."""
    if needed > cache["keys"].shape[1]:
        slots = -(-needed // GROWTH) * GROWTH
        for name in ("keys", "values"):
            old = cache[name]
            cache[name] = torch.cat((old, old.new_zeros(old.shape[0], slots - old.shape[1], *old.shape[2:])), 1)
    return cache["keys"].shape[1]
