"""Reference implementation of softmax attention: the formula, on a dense score matrix. It is never optimised.

    a_ts  = scale * q_t k_s                                           softcap: a_ts <- softcap * tanh(a_ts / softcap)
                                                                      slopes:  a_ts <- a_ts - slope * |t - s|
    lse_t = log(exp(sink) + sum_s exp a_ts)                           over the keys s that query t attends to
    o_t   = sum_s exp(a_ts - lse_t) v_s

Vaswani et al., "Attention Is All You Need", section 3.2.1. ``flash_attention`` describes the options.
"""

from functools import partial

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from .options import Options, by_sequence, positions, visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute o [B,Tq,Hq,V] and lse [B,Tq,Hq], in fp32 or wider, from q [B,Tq,Hq,D], k [B,Tk,H,D], v [B,Tk,H,V]."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attend(q, k, v, options)
    return by_sequence(partial(_attend, options=options), (q, k, v), cu_seqlens_q, cu_seqlens_k)


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, k, v)
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    t, s = positions(q.shape[1], k.shape[1], q.device)
    mask = visible(t, s, options.left, options.right)
    if options.block_mask is not None:
        mask = mask & options.block_mask.to_dense(q.shape[1], k.shape[1])
    with no_autocast(q):
        scores = options.scale * torch.einsum("bthd,bshd->bhts", q.to(dtype), k)
        if options.softcap is not None:
            scores = options.softcap * (scores / options.softcap).tanh()
        if options.alibi_slopes is not None:
            scores = scores - options.alibi_slopes.to(dtype)[:, None, None] * (t[:, None] - s).abs()
        scores = scores.masked_fill(~mask, -torch.inf)
        lse = _log_sum_exp(scores, options.sinks)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
        return torch.einsum("bhts,bshv->bthv", weights, v), lse.squeeze(-1).transpose(1, 2)


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, options: Options, with_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute o [B,n,Hq,V] and lse [B,n,Hq], row by row, over the positions that the row's cache [S,H,..] holds."""
    slots = k.shape[1]
    rows = []
    for b, length in enumerate(lengths.tolist()):
        first = max(length - slots, 0 if starts is None else int(starts[b]))
        kept = torch.arange(min(first, length), length, device=q.device) % max(slots, 1)
        rows.append(_attend(q[b, None], k[b, None, kept], v[b, None, kept], options))
    if not rows:
        return _attend(q, k[:, :0], v[:, :0], options)
    return torch.cat([o for o, _ in rows]), torch.cat([lse for _, lse in rows])


def _log_sum_exp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Compute the log-sum-exp [B,Hq,Tq,1] over the keys of scores [B,Hq,Tq,Tk] and the sinks [Hq].

    It is -inf, with a gradient of 0, where all scores are -inf.
    """
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).logsumexp(-1, keepdim=True).masked_fill(nothing, -torch.inf)
