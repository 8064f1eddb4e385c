"""Preparation of the softmax-attention kernels' arguments: strides, descriptors, constexprs, tiles of packed rows."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...runtime.architectures import architecture, warn_of_launch
from ..options import BlockMask, Options
from .launch import Launch, attention_launch


def launch_of(kernel: str, q: Tensor, v: Tensor) -> Launch:
    """Return the launch row; on a GPU, warn once if the row is not verified there."""
    return _launch(kernel, q.device, q.shape[3], v.shape[3], 8 * q.itemsize)


@cache
def _launch(kernel: str, device: torch.device, key_dim: int, value_dim: int, bits: int) -> Launch:
    name = architecture(device)
    launch = attention_launch(kernel, name, key_dim, value_dim, bits)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch


def aligned(x: Tensor) -> Tensor:
    """Return x [B,T,H,D] with a contiguous last dimension and every row at a multiple of 16 bytes; a copy if needed."""
    by_16 = all(stride and stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    if x.stride(3) == 1 and by_16 and x.data_ptr() % 16 == 0:
        return x
    dim, each = x.shape[3], 16 // x.itemsize
    # Not F.pad: if D needs no padding, it returns a clone with the same order of strides.
    return x.new_empty(*x.shape[:3], -(-dim // each) * each)[..., :dim].copy_(x)


def dense(x: Tensor | None) -> Tensor | None:
    """Return an optional tensor as contiguous, as the kernels expect it."""
    return None if x is None else x.contiguous()


def visited_tiles(launch: Launch) -> dict[str, tuple[int, int]]:
    """Return the tile sizes (rows, columns) of the operands that a program loops over.

    Only these use descriptors. The other operands, which a program reads once before its loop, do not: Triton would
    then keep them in registers instead of shared memory, and the accumulators need the registers.
    """
    if launch.kernel == "key_gradients":
        return {"q": (launch.block_m, launch.block_d), "do": (launch.block_m, launch.block_v)}
    return {"k": (launch.block_n, launch.block_d), "v": (launch.block_n, launch.block_v)}


def arguments(
    launch: Launch, operands: dict[str, Tensor], options: Options, tiles: "Tiles", cu_seqlens: tuple[Tensor | None, ...]
) -> dict[str, Any]:
    """Return the arguments that all kernels have in common, by name.

    Args:
        launch: the launch row.
        operands: q, k, v and optionally do, [B,T,H,D].
        options: options of the call; the caller adds sinks and block mask.
        tiles: the tiles that are divided among the programs.
        cu_seqlens: offsets of packed queries and keys, or None both.
    """
    queries, heads, key_dim = operands["q"].shape[1:]
    keys, kv_heads, value_dim = operands["v"].shape[1:]
    scale, softcap = score_numbers(options.scale, options.softcap)
    taken: dict[str, Any] = {
        "alibi_slopes": dense(options.alibi_slopes),
        "cu_seqlens_q": dense(cu_seqlens[0]),
        "cu_seqlens_k": dense(cu_seqlens[1]),
        "tiles_sequence": tiles.sequence,
        "tiles_before": tiles.before,
        "scale": scale,
        "softcap": softcap,
        "queries": queries,
        "keys": keys,
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "LEFT": options.left,
        "RIGHT": options.right,
        "SOFTCAP": options.softcap is not None,
        "BLOCK_SIZE": options.block_mask and options.block_mask.block_size,
        "PACKED": cu_seqlens[0] is not None,
        **constexprs(launch, key_dim, value_dim),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    for name, x in operands.items():
        if not x.shape[1]:  # a descriptor needs at least one row
            x = x.new_zeros(x.shape[0], 1, *x.shape[2:])
        taken[name] = x
        if launch.tma and name in visited_tiles(launch):
            rows, columns = visited_tiles(launch)[name]
            taken[name] = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns])
        taken |= {f"{name}_{of}": stride for of, stride in zip(("batch", "time", "head"), x.stride(), strict=False)}
    return taken


def constexprs(launch: Launch, key_dim: int, value_dim: int) -> dict[str, int | str]:
    """Return the constexprs that depend on dims and launch row."""
    return {
        "D": key_dim,
        "V": value_dim,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": launch.block_d,
        "BLOCK_V": launch.block_v,
        "TMA": launch.tma,
        "PRECISION": launch.precision,
        "STAGES": launch.num_stages,
    }


def score_numbers(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return ``scale`` and ``softcap`` as ``tile_scores`` takes them, in base 2, from those of the formula."""
    log2e = math.log2(math.e)
    return (scale * log2e, 0.0) if softcap is None else (2 * scale / softcap * log2e, softcap * log2e)


class Tiles(NamedTuple):
    """The tiles of one head's tokens.

    Attributes:
        number: how many tiles.
        sequence: for packed rows, the sequence of each tile, int32 [number]; else None.
        before: for packed rows, the number of tiles before each sequence, int32 [N]; else None.
    """

    number: int
    sequence: Tensor | None = None
    before: Tensor | None = None


def tiles_of(tokens: int, block: int, cu_seqlens: Tensor | None, mask: BlockMask | None) -> Tiles:
    """Divide tokens into tiles of at most ``block``, each within one sequence and one block of the block mask."""
    if cu_seqlens is not None:
        return packed_tiles(cu_seqlens, block, tokens)
    if mask is not None:
        return Tiles(-(-tokens // mask.block_size) * -(-mask.block_size // block))
    return Tiles(-(-tokens // block))


def packed_tiles(cu_seqlens: Tensor, block: int, tokens: int) -> Tiles:
    """Divide a packed row into tiles of ``block`` tokens without reading values back from the GPU.

    The number of tiles is the largest possible one. Surplus tiles belong to the last sequence, past its tokens.
    """
    sequences = cu_seqlens.numel() - 1
    ends = (cu_seqlens.diff() + block - 1).div(block, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(tokens // block + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tiles, right=True).clamp(max=sequences - 1)
    before = torch.cat((ends.new_zeros(1), ends[:-1]))
    return Tiles(len(tiles), sequence.int(), before.int())
