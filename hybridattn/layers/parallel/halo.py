"""Convolutions and window attention over segments, with the tokens before each segment (halo) from other ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.flash_attention import flash_attention
from .shards import Shards


def convolution_tails(shards: Shards, x: Tensor, size: int) -> Tensor:
    """Return the last ``size`` inputs before every piece, [N,size,D]; zeros where a sequence has fewer."""
    tails = [F.pad(tail, (0, 0, size - tail.shape[1], 0)) for tail in shards.before(x, size, "convolution")]
    return shards.to_pieces(torch.stack(tails))


def attend_with_halo(
    shards: Shards, q: Tensor, k: Tensor, v: Tensor, size: int | None, options: dict[str, Any]
) -> Tensor:
    """Compute softmax attention of this rank's queries, with earlier keys and values from other ranks.

    Args:
        shards: this rank's pieces.
        q: queries [B,T,Hq,D] of this rank.
        k, v: keys and values [B,T,H,D] of this rank, of the same head dimension.
        size: number of earlier keys before each segment, in the same sequence; None for all.
        options: further arguments of ``flash_attention``.

    Returns:
        [B,T,Hq,D].
    """
    both = torch.cat((k, v), -1)
    halos = shards.before(both, size, "keys" if size is None else "window")
    parts = []
    for (segment, at), halo in zip(shards.context.places(shards.context.rank), halos, strict=True):
        parts += [halo, both[:, at : at + segment.stop - segment.start]]
    longer = [0] * len(shards.ends)
    for number, _, piece in shards.continued:
        longer[piece + 1] = halos[number].shape[1]
    keys, values = shards.pack(torch.cat(parts, 1)).chunk(2, -1)
    ends = shards.offsets + torch.tensor(longer, device=q.device).cumsum(0)
    o = flash_attention(shards.pack(q), keys, values, cu_seqlens_q=shards.offsets, cu_seqlens_k=ends, **options)
    return shards.unpack(o)
