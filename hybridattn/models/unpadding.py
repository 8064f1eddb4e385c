"""Padding is packing: the real tokens of a padded batch as one packed row, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Packing(NamedTuple):
    """Which tokens of a padded batch are real, and their offsets as one packed row."""

    tokens: Tensor  # places [n] in the flattened batch
    cu_seqlens: Tensor  # [B+1]

    @staticmethod
    def of(mask: Tensor) -> "Packing":
        """mask: boolean [B,T], True for real tokens anywhere in the row.

        A graph being traced cannot depend on their number: there padding comes last in the packed row, where tokens
        belong to no sequence.
        """
        cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
        if torch.compiler.is_compiling():
            return Packing(mask.flatten().logical_not().to(torch.uint8).argsort(stable=True), cu_seqlens)
        return Packing(mask.flatten().nonzero().squeeze(1), cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """[B,T,..] -> [1,n,..]."""
        return x.flatten(0, 1)[self.tokens][None]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """[1,n,D] -> the shape of ``like`` [B,T,D], zeros for padding."""
        if torch.compiler.is_compiling():  # see ``of``
            padding = torch.arange(packed.shape[1], device=packed.device) >= self.cu_seqlens[-1]
            packed = packed.masked_fill(padding[:, None], 0)
        out = packed.new_zeros(like.shape[0] * like.shape[1], packed.shape[-1])
        return out.index_put((self.tokens,), packed[0]).view(*like.shape[:2], -1)
