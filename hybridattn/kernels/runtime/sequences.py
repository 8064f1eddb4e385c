"""Packed sequences: several sequences in one row of a batch, separated by the offsets ``cu_seqlens``.

For sequences of n1, n2, .. tokens, ``cu_seqlens`` is [0, n1, n1 + n2, ..].
"""

from itertools import pairwise

import torch
from torch import Tensor

from .checks import reads_values


def check_cu_seqlens(name: str, cu_seqlens: Tensor, batch: int, tokens: int, check_values: bool) -> None:
    """Check the offsets ``cu_seqlens`` [N+1] of one packed row of ``tokens`` tokens.

    Tokens past the last offset belong to no sequence; operators write zeros there. Values are checked if
    ``reads_values``, which synchronises a GPU.

    Raises:
        ValueError: the offsets or the batch size do not fit a packed row.
    """
    check_offsets(name, cu_seqlens, batch)
    if reads_values(cu_seqlens, check_values):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] > tokens or offsets != sorted(offsets):
            raise ValueError(f"{name}: expected ascending offsets from 0 to at most {tokens} tokens, got {offsets}")


def check_offsets(name: str, cu_seqlens: Tensor, batch: int) -> None:
    """Check type and shape of the offsets of one packed row, not their values."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name}: expected a tensor of integer offsets [N+1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"{name}: expected integer offsets of shape [N+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{name}: expected one packed row (batch size 1), got batch size {batch}")


def sequence_slices(cu_seqlens: Tensor) -> list[slice]:
    """Return the time slice of every sequence of a packed row; reads the values of ``cu_seqlens``."""
    return [slice(a, b) for a, b in pairwise(cu_seqlens.tolist())]


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the sequence index of every token, int64 [tokens]; N for tokens past the last offset."""
    at = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous().to(at.dtype), at, right=True)
