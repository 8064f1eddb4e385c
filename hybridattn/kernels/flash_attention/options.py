"""Options of softmax attention that all backends share: their checks, the block mask, visibility of keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.checks import reads_values
from ..runtime.sequences import sequence_slices


class BlockMask(NamedTuple):
    """The key blocks that each query block attends to (its *live* blocks), in compressed sparse rows.

    One mask holds for the whole batch and all heads. Query block i is queries i * block_size .. (i + 1) * block_size -
    1, and key block j likewise; the last blocks may be shorter. Blocks count from the first query and the first key,
    also if there are more keys than queries.

    Attributes:
        offsets: integers [query blocks + 1], ascending from 0: key_blocks[offsets[i]:offsets[i + 1]] are live for
            query block i.
        key_blocks: integers [n], ascending within each query block. A query block may have none.
        block_size: tokens of a block.
    """

    offsets: Tensor
    key_blocks: Tensor
    block_size: int

    @classmethod
    def from_dense(cls, live: Tensor, block_size: int) -> "BlockMask":
        """Make the mask in which key block j is live for query block i if ``live[i, j]`` is True.

        Args:
            live: boolean [query blocks, key blocks].
            block_size: tokens of a block.
        """
        return cls(F.pad(live.sum(1).cumsum(0), (1, 0)), live.nonzero()[:, 1], block_size)

    def to_dense(self, queries: int, keys: int) -> Tensor:
        """Return the mask as a boolean tensor [queries, keys] of tokens."""
        size, rows = self.block_size, self.offsets.numel() - 1
        live = torch.zeros(rows, -(-keys // size), dtype=torch.bool, device=self.offsets.device)
        row = torch.arange(rows, device=live.device).repeat_interleave(self.offsets.diff())
        live[row, self.key_blocks.long()] = True
        return live.repeat_interleave(size, 0)[:queries].repeat_interleave(size, 1)[:, :keys]


@dataclass(frozen=True)
class Options:
    """Checked options of one call.

    Attributes:
        scale: factor of the scores.
        left, right: how many keys before and after its own position a query attends to; None for all.
        alibi_slopes: [Hq]; ``slope * |t - s|`` is subtracted from the scores.
        sinks: [Hq], differentiable; exp(sink) is added to the softmax denominator.
        softcap: scores become ``softcap * tanh(score / softcap)``, before slopes and masks.
        block_mask: live blocks, combined with left and right by a logical and.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    block_mask: BlockMask | None = None

    @property
    def plain(self) -> bool:
        """Whether the call is full, causal or causal-window attention without any other option."""
        extras = (self.alibi_slopes, self.sinks, self.softcap, self.block_mask)
        return all(x is None for x in extras) and (self.right == 0 or (self.left is None and self.right is None))

    def flat(self) -> tuple:
        """Return the values as arguments of a torch library op; ``of`` is the inverse."""
        mask = self.block_mask or (None, None, None)
        return self.scale, self.left, self.right, self.alibi_slopes, self.sinks, self.softcap, *mask

    @classmethod
    def of(cls, scale, left, right, alibi_slopes, sinks, softcap, offsets, key_blocks, block_size) -> "Options":
        mask = None if offsets is None else BlockMask(offsets, key_blocks, block_size)
        return cls(scale, left, right, alibi_slopes, sinks, softcap, mask)


def by_sequence(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: tuple[Tensor, Tensor, Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Apply ``run`` to every packed sequence and concatenate the results.

    Args:
        run: (q, k, v) -> (o, lse or None).
        inputs: packed q, k and v.
        cu_seqlens_q, cu_seqlens_k: offsets [N+1].

    Returns:
        o and lse (or None) of the packed row; zeros and -inf for queries of no sequence.
    """
    q, k, v = inputs
    spans = zip(sequence_slices(cu_seqlens_q), sequence_slices(cu_seqlens_k), strict=True)
    parts = [run(q[:, a], k[:, b], v[:, b]) for a, b in spans]
    # Queries past the last sequence attend to no keys and have no sink.
    o, lse = run(q[:, sum(o.shape[1] for o, _ in parts) :], k[:, :0], v[:, :0])
    parts.append((o, None if lse is None else torch.full_like(lse, -torch.inf)))
    lse = [lse for _, lse in parts if lse is not None]
    return torch.cat([o for o, _ in parts], 1), torch.cat(lse, 1) if lse else None


def positions(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions [Tq] of the queries and [Tk] of the keys; the last query and the last key share one."""
    return torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device)


def visible(t: Tensor, s: Tensor, left: int | None, right: int | None) -> Tensor:
    """Return a boolean mask [..,Tq,Tk]: whether causality and window let a query attend to a key.

    Args:
        t: positions of the queries [..,Tq].
        s: positions of the keys [..,Tk].
        left, right: as in ``Options``.
    """
    ahead = s[..., None, :] - t[..., :, None]
    mask = torch.ones_like(ahead, dtype=torch.bool) if right is None else ahead <= right
    return mask if left is None else mask & (ahead >= -left)


# ---------------------------------------------------------------------------------------------- checks of the arguments
def check_window(window: int | tuple[int, int] | None, causal: bool) -> tuple[int | None, int | None]:
    """Check ``window`` and return it as (left, right) of ``Options``."""
    if window is None:
        return None, 0 if causal else None
    if isinstance(window, int) and not isinstance(window, bool):
        if window <= 0:
            raise ValueError(f"window: expected a positive integer, a pair (left, right) or None, got {window}")
        if not causal:
            raise ValueError(
                f"window: expected a pair (left, right) or None without causal=True, got {window}; "
                f"a causal window={window} is ({window - 1}, 0)"
            )
        return window - 1, 0
    if not isinstance(window, tuple | list) or len(window) != 2 or not all(_is_int(x) and x >= 0 for x in window):
        raise ValueError(
            f"window: expected a positive integer, a pair (left, right) of integers >= 0 or None, got {window!r}"
        )
    left, right = window
    if causal and right:
        raise ValueError(
            f"window: expected a pair (left, 0) with causal=True, got {window!r}; a number w is the pair (w - 1, 0)"
        )
    return left, right


def check_number(name: str, x: float | None, positive: bool = False) -> None:
    """Check that ``x`` is None or a finite Python number, with ``positive`` above zero."""
    number = isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < float("inf")
    if x is not None and (not number or (positive and x <= 0)):
        raise ValueError(f"{name}: expected a finite {'positive ' if positive else ''}number or None, got {x!r}")


def check_block_mask(mask: BlockMask, queries: int, keys: int, device: torch.device, check_values: bool) -> None:
    """Check ``mask`` for the given numbers of queries and keys; its values if ``reads_values`` (synchronises a GPU)."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"block_mask: expected a BlockMask or None, got {type(mask).__name__}")
    offsets, key_blocks, size = mask
    if not _is_int(size) or size <= 0:
        raise ValueError(f"block_mask: expected a positive integer block_size, got {size!r}")
    query_blocks, limit = -(-queries // size), -(-keys // size)
    for name, x in (("offsets", offsets), ("key_blocks", key_blocks)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"block_mask: expected {name} of int32 or int64 in one dimension, got {given}")
        if x.device != device:
            raise ValueError(f"block_mask: expected {name} on {device} (that of q), got {x.device}")
    if offsets.numel() != query_blocks + 1:
        raise ValueError(
            f"block_mask: expected {query_blocks + 1} offsets for {queries} queries in blocks of {size}, "
            f"got {offsets.numel()}"
        )
    if not reads_values(offsets, check_values):
        return
    counts = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != key_blocks.numel() or bool((counts < 0).any()):
        raise ValueError(
            f"block_mask: expected ascending offsets from 0 to {key_blocks.numel()} key_blocks, got {offsets.tolist()}"
        )
    row = torch.arange(query_blocks, device=device).repeat_interleave(counts)
    inside = bool(((key_blocks >= 0) & (key_blocks < limit)).all())
    if not inside or bool((key_blocks.diff()[row.diff() == 0] <= 0).any()):
        raise ValueError(
            f"block_mask: expected key_blocks from 0 to {limit - 1}, ascending within each query block, "
            f"got {key_blocks.tolist()}"
        )


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
