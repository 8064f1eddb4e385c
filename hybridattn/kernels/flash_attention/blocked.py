"""Softmax attention on PyTorch's own fused kernel: the torch backend.

Full attention is one call. A window is cut into blocks of queries, each with the keys it can reach, and the blocks
become batch entries of one call: time and memory grow with T * window. Autograd is PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import visible

BLOCK = 512  # queries per call where a mask is needed: bounds the mask, not the result


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float) -> Tensor:
    """[B,Tq,Hq,V] from q [B,Tq,Hq,D], k [B,Tk,H,D], v [B,Tk,H,V]; a query that sees nothing gets zeros."""
    queries, keys = q.shape[1], k.shape[1]
    if causal and queries > keys:  # queries before the first key
        seen = attend(q[:, queries - keys :], k, v, causal=True, window=window, scale=scale)
        return F.pad(seen, (0, 0, 0, 0, queries - keys, 0))
    if q.numel() == 0 or v.numel() == 0:
        return (q.sum() + k.sum() + v.sum()) + q.new_zeros(*q.shape[:3], v.shape[3])
    if window is not None and window < keys:
        return _windowed(q, k, v, window, scale)
    if not causal or queries == keys:
        return _sdpa(q, k, v, None, causal and queries > 1, scale)
    past = keys - queries
    parts = []
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        mask = visible(last - first, past + last, True, None, q.device)
        parts.append(_sdpa(q[:, first:last], k[:, : past + last], v[:, : past + last], mask, False, scale))
    return torch.cat(parts, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention in which a query sees the ``window`` last keys; Tq <= Tk."""
    batch, queries, heads, dim = q.shape
    past = k.shape[1] - queries
    first = min(max(window - 1 - past, 0), queries)  # queries that still see every key up to their own
    start = attend(q[:, :first], *(x[:, : past + first] for x in (k, v)), causal=True, window=None, scale=scale)
    if first == queries:
        return start
    size = min(max(window, 64), BLOCK, queries - first)
    blocks = -(-(queries - first) // size)
    reach = size + window - 1  # keys that a block can see
    after = first + blocks * size - queries
    k, v = (F.pad(x[:, past + first - window + 1 :], (0, 0, 0, 0, 0, after)) for x in (k, v))
    k, v = (x.unfold(1, reach, size).movedim(-1, 2).flatten(0, 1) for x in (k, v))
    q = F.pad(q[:, first:], (0, 0, 0, 0, 0, after)).reshape(batch * blocks, size, heads, dim)
    mask = visible(size, reach, True, window, q.device)
    rest = _sdpa(q, k, v, mask, False, scale).reshape(batch, blocks * size, heads, -1)
    return torch.cat((start, rest[:, : queries - first]), 1)


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """[B,1,Hq,V]: one query per row against the first ``lengths`` slots of its cache."""
    mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None]
    return _sdpa(q, k, v, mask, False, scale)
