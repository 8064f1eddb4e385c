"""What tensors become on their way into a kernel."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def aligned(x: Tensor) -> Tensor:
    """x [B,T,H,D] so laid out that every row of a head starts at a multiple of 16 bytes: itself, or else a copy."""
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    by_16 = all(stride and stride * x.itemsize % 16 == 0 for stride in strides)
    if x.stride(3) == 1 and by_16 and x.data_ptr() % 16 == 0:
        return x
    dim = x.shape[3]
    return F.pad(x, (0, -dim % (16 // x.itemsize)))[..., :dim]


def operand(x: Tensor, tma: bool, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """x [B,T,H,D], for a kernel to read rows of a head: a descriptor of tiles [rows,columns], or itself."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns]) if tma else x


def score_numbers(scale: float, softcap: float | None) -> tuple[float, float]:
    """``scale`` and ``softcap`` of ``tile_scores``, from those of the formula."""
    log2e = math.log2(math.e)
    return (scale * log2e, 0.0) if softcap is None else (2 * scale / softcap * log2e, softcap * log2e)


def packed_tiles(cu_seqlens: Tensor, block: int, tokens: int) -> tuple[Tensor, Tensor]:
    """For tiles of ``block`` tokens that do not reach over sequences: the sequence of each, and the tiles before each.

    Returns:
        int32 [n] and [N]: as many tiles as there can be, so that nothing is read back; those that there are not count
        as the last sequence's, beyond its tokens.
    """
    sequences = cu_seqlens.numel() - 1
    ends = (cu_seqlens.diff() + block - 1).div(block, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(tokens // block + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tiles, right=True).clamp(max=sequences - 1)
    before = torch.cat((ends.new_zeros(1), ends[:-1]))
    return sequence.int(), before.int()
