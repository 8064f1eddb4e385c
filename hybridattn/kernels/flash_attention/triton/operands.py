"""What tensors become on their way into a kernel."""

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
    """The launch row, with what has to be said about it said."""
    return _launch(kernel, q.device, q.shape[3], v.shape[3], 8 * q.itemsize)


@cache
def _launch(kernel: str, device: torch.device, key_dim: int, value_dim: int, bits: int) -> Launch:
    name = architecture(device)
    launch = attention_launch(kernel, name, key_dim, value_dim, bits)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch


def aligned(x: Tensor) -> Tensor:
    """x [B,T,H,D] so laid out that every row of a head starts at a multiple of 16 bytes: itself, or else a copy."""
    by_16 = all(stride and stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    if x.stride(3) == 1 and by_16 and x.data_ptr() % 16 == 0:
        return x
    dim, each = x.shape[3], 16 // x.itemsize
    # Not F.pad: without anything to pad, it is a clone that keeps the order of strides.
    return x.new_empty(*x.shape[:3], -(-dim // each) * each)[..., :dim].copy_(x)


def dense(x: Tensor | None) -> Tensor | None:
    """An option's tensor as kernels read it: its elements side by side."""
    return None if x is None else x.contiguous()


def visited_tiles(launch: Launch) -> dict[str, tuple[int, int]]:
    """Of the operands that a program goes through: [rows,columns] of a head that it reads at a time.

    The others, which it reads once, never come by descriptors: Triton would keep them in registers, not shared memory,
    through the whole loop, and there the accumulators need the room.
    """
    if launch.kernel == "key_gradients":
        return {"q": (launch.block_m, launch.block_d), "do": (launch.block_m, launch.block_v)}
    return {"k": (launch.block_n, launch.block_d), "v": (launch.block_n, launch.block_v)}


def arguments(
    launch: Launch, operands: dict[str, Tensor], options: Options, tiles: "Tiles", cu_seqlens: tuple[Tensor | None, ...]
) -> dict[str, Any]:
    """What every kernel takes: q, k, v and perhaps do [B,T,H,D] with their strides, the options without sinks and block
    mask, the tiles that programs have, the offsets of packed queries and keys, and what the launch row decides.
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
        if not x.shape[1]:  # a descriptor is of something
            x = x.new_zeros(x.shape[0], 1, *x.shape[2:])
        taken[name] = x
        if launch.tma and name in visited_tiles(launch):
            rows, columns = visited_tiles(launch)[name]
            taken[name] = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns])
        taken |= {f"{name}_{of}": stride for of, stride in zip(("batch", "time", "head"), x.stride(), strict=False)}
    return taken


def constexprs(launch: Launch, key_dim: int, value_dim: int) -> dict[str, int | str]:
    """Those of a kernel's constexprs that dims and launch row decide."""
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
    """``scale`` and ``softcap`` of ``tile_scores``, from those of the formula."""
    log2e = math.log2(math.e)
    return (scale * log2e, 0.0) if softcap is None else (2 * scale / softcap * log2e, softcap * log2e)


class Tiles(NamedTuple):
    """Tiles of one head's tokens; of packed rows also the sequence of each, and the tiles before each sequence."""

    number: int
    sequence: Tensor | None = None
    before: Tensor | None = None


def tiles_of(tokens: int, block: int, cu_seqlens: Tensor | None, mask: BlockMask | None) -> Tiles:
    """Tiles of ``block`` tokens, which reach neither over sequences nor over blocks of a block mask."""
    if cu_seqlens is not None:
        return packed_tiles(cu_seqlens, block, tokens)
    if mask is not None:
        return Tiles(-(-tokens // mask.block_size) * -(-mask.block_size // block))
    return Tiles(-(-tokens // block))


def packed_tiles(cu_seqlens: Tensor, block: int, tokens: int) -> Tiles:
    """As many tiles as there can be, so that nothing is read back; those that there are not count as the last
    sequence's, beyond its tokens. ``sequence`` [n] and ``before`` [N] are int32.
    """
    sequences = cu_seqlens.numel() - 1
    ends = (cu_seqlens.diff() + block - 1).div(block, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(tokens // block + sequences, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tiles, right=True).clamp(max=sequences - 1)
    before = torch.cat((ends.new_zeros(1), ends[:-1]))
    return Tiles(len(tiles), sequence.int(), before.int())
