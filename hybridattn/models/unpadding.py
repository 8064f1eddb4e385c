"""Conversion of a padded batch to one packed row of its real tokens, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Packing(NamedTuple):
    """Indices of the real tokens of a padded batch, and the offsets of the sequences in the packed row."""

    tokens: Tensor  # indices [n] into the flattened batch
    cu_seqlens: Tensor  # offsets [B+1]

    @staticmethod
    def of(mask: Tensor) -> "Packing":
        """Return the packing for a mask.

        Under torch.compile shapes cannot depend on the number of real tokens. There, the packed row also contains the
        padding, after the last sequence.

        Args:
            mask: boolean [B,T], True for real tokens, which may be anywhere in a row.
        """
        cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
        if torch.compiler.is_compiling():
            return Packing(mask.flatten().logical_not().to(torch.uint8).argsort(stable=True), cu_seqlens)
        return Packing(mask.flatten().nonzero().squeeze(1), cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """Select the real tokens: [B,T,..] -> [1,n,..]."""
        return x.flatten(0, 1)[self.tokens][None]

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Undo ``pack``: [1,n,D] -> [B,T,D], the shape of ``like``, with zeros for padding."""
        if torch.compiler.is_compiling():  # the packed row contains padding, see ``of``
            padding = torch.arange(packed.shape[1], device=packed.device) >= self.cu_seqlens[-1]
            packed = packed.masked_fill(padding[:, None], 0)
        out = packed.new_zeros(like.shape[0] * like.shape[1], packed.shape[-1])
        return out.index_put((self.tokens,), packed[0]).view(*like.shape[:2], -1)
