"""Keys and values kept for softmax attention: all of them, or the last ``window`` in a ring buffer.

The cache holds ``keys`` [N,S,H,D], ``values`` [N,S,H,V] and ``lengths`` [N], the tokens each sequence has had. A ring
buffer keeps position p in slot p % window; a full cache keeps it in slot p, is allocated to the longest prompt and
grows in steps of GROWTH slots.
"""

import torch
from torch import Tensor

from ..kernels.runtime.sequences import sequence_ids, sequence_slices
from .mixer import Cache

GROWTH = 256


def past(cache: Cache, name: str, row: int, keep: int | None) -> Tensor:
    """The last ``keep`` (None: all) kept keys or values [n,H,D] of a sequence, oldest first."""
    length, slots = int(cache["lengths"][row]), cache[name].shape[1]
    first = 0 if keep is None else max(length - keep, 0)
    return cache[name][row, torch.arange(first, length, device=cache[name].device) % slots]


def append(cache: Cache, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None) -> None:
    """Keep new keys [B,T,H,D] and values [B,T,H,V], or those of a packed row [1,T,..]."""
    rows, tokens = (k.shape[0], k.shape[1]) if cu_seqlens is None else (cu_seqlens.numel() - 1, k.shape[1])
    if cu_seqlens is None:
        row = torch.arange(rows, device=k.device)[:, None].expand(rows, tokens)
        offset = torch.arange(tokens, device=k.device).expand(rows, tokens)
        added = torch.full((rows,), tokens, device=k.device)
        longest_added = tokens
    else:
        cu_seqlens = cu_seqlens.long()
        added = cu_seqlens.diff()
        row = sequence_ids(cu_seqlens, tokens)[None]
        offset = torch.arange(tokens, device=k.device) - cu_seqlens[row.clamp(max=max(rows - 1, 0))]
        longest_added = max((s.stop - s.start for s in sequence_slices(cu_seqlens)), default=0)
    if "keys" not in cache:
        cache["lengths"] = torch.zeros(rows, dtype=torch.long, device=k.device)
        for name, x in (("keys", k), ("values", v)):
            cache[name] = x.new_zeros(rows, window or longest_added, *x.shape[2:])
    elif window is None:
        _grow(cache, longest_added)
    lengths = cache["lengths"]
    position = torch.cat((lengths, lengths.new_zeros(1)))[row] + offset
    slots = cache["keys"].shape[1]
    kept = row < rows
    if window is not None:  # of more tokens than slots the last ones stay
        position, kept = position % slots, kept & (offset >= torch.cat((added, added.new_zeros(1)))[row] - slots)
    index = (row[kept], position[kept])
    for name, x in (("keys", k), ("values", v)):
        cache[name] = _put(cache[name], index, x[kept])
    cache["lengths"] = lengths + added if torch.is_grad_enabled() else lengths.add_(added)


def _put(kept: Tensor, index: tuple[Tensor, ...], new: Tensor) -> Tensor:
    return kept.index_put(index, new) if torch.is_grad_enabled() else kept.index_put_(index, new.to(kept.dtype))


def _grow(cache: Cache, added: int) -> None:
    """Make room for ``added`` more tokens of every sequence."""
    needed = int(cache["lengths"].max()) + added if cache["lengths"].numel() else 0
    if needed > cache["keys"].shape[1]:
        slots = -(-needed // GROWTH) * GROWTH
        for name in ("keys", "values"):
            old = cache[name]
            cache[name] = torch.cat((old, old.new_zeros(old.shape[0], slots - old.shape[1], *old.shape[2:])), 1)
