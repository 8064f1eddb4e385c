"""The specification of softmax attention: the formula, on a dense score matrix. Never optimised.

    o_t = sum_s softmax_s(scale * q_t k_s) v_s      over the s that t may see

Vaswani et al., "Attention Is All You Need", section 3.2.1; the window as in Beltagy et al., "Longformer", section 3.1.
"""

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Boolean [Tq,Tk]: may query t see key s? The last query and the last key are the same moment."""
    t = torch.arange(queries, device=device)[:, None] + keys - queries
    s = torch.arange(keys, device=device)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        mask &= s <= t
    if window is not None:
        mask &= s > t - window
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float) -> Tensor:
    """[B,Tq,Hq,V] from q [B,Tq,Hq,D], k [B,Tk,H,D], v [B,Tk,H,V]; a query that sees nothing gets zeros."""
    dtype = compute_dtype(q, k, v)
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    mask = visible(q.shape[1], k.shape[1], causal, window, q.device)
    with no_autocast(q):
        scores = scale * torch.einsum("bthd,bshd->bhts", q.to(dtype), k)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
        return torch.einsum("bhts,bshv->bthv", weights, v)
