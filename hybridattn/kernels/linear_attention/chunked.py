"""The torch backend of linear attention: chunked matrix products, forward and backward, for every kind of gate.

Dimensions: R rows (one chunk of one head of one sequence each), C tokens of a chunk, K key dim, V value dim, G gates
per head (K for gates per channel, 1 for gates per head). With b the inclusive running sum of the log-decays inside a
chunk and S the state before the chunk:

    inter   o_t += (q_t * exp b_t) S
    intra   o_t += sum_{s<=t} [ sum_k q_tk k_sk exp(b_tk - b_sk) ] v_s
    state   S   <- Diag(exp b_C) S + (k * exp(b_C - b))^T v

(Yang et al., "Gated Linear Attention Transformers", section 4). Each exponential except exp b_C is the product of a
factor for the query's token and a factor for the key's token. So all work is matrix products. The factors depend on a
reference token, which depends on the gates of the row. Both choices are exact:

    cool    The reference is the chunk's middle token: q * exp(b_t - b_mid) and k * exp(b_mid - b_s), at most
            exp(+-COOL). The decay between middle and edges (``entry``, ``exit``) multiplies the states.
    hot     Where these factors could overflow, the scores are computed by halves. For a pair (t, s) in the two halves
            of a block the reference is the last token of the left half, so both factors are <= 1. This takes log2(C)
            small products.

The gradient of g_u sums, over all factors that contain exp(g_u), the factor times its gradient. In hot rows no large
terms cancel, so the gradient stays exact where its true value is of the size exp(-60).
"""

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.opaque_ops import opaque_op
from . import features
from .chunks import (
    Decay,
    Hot,
    Layout,
    earlier,
    hot_scores,
    hot_scores_backward,
    later,
    per_gate,
    scan,
    scan_backward,
    time_segments,
    time_spans,
)


class Rows:
    """Operands, decays and scores of one segment, which forward and backward share.

    A row is a chunk of a key head. The J query heads that share the key head are concatenated, [R,J*C,K], so that one
    product computes all of them. Where ``share`` value heads share a key head, each has a row with the key head's q and
    k. With ``keys_too`` the keys are one more query head, the last one, which sees earlier tokens only.
    """

    v: Tensor  # [R,C,V]
    update: Tensor  # what each chunk adds to the state, [R,K,V]
    before: Tensor  # states before each chunk, [R,K,V]
    state: Tensor  # states after the segment, [N,H,K,V]

    def __init__(self, q, k, g, taylor, layout: Layout, dtype: torch.dtype, share: int = 1, keys_too: bool = False):
        self.group, self.share, self.keys_too = q.shape[2] // k.shape[2] + keys_too, share, keys_too
        self.shares_gates = g is not None and g.shape[2] == k.shape[2]
        self.decay = decay = None
        if g is not None:
            self.decay = decay = Decay.of(layout.split(g, dtype, share=share if self.shares_gates else 1))
        self.total = None if decay is None else decay.total
        self.hot = None if decay is None else decay.hot
        self.raw = None
        self.root = 1.0 if taylor is None else taylor**0.5
        if taylor is not None:  # a position without a token also has the feature 1, but its value is zero
            self.raw = layout.split(q, dtype, self.root), layout.split(k, dtype, self.root)
            self.q, self.k = stack(features.taylor(self.raw[0]), self.group), features.taylor(self.raw[1])
        else:
            self.q = self._queries(q, k, layout, dtype, decay)
            self.k = layout.split(k, dtype, 1.0 if decay is None else decay.key, share)
        self.scores = torch.bmm(self.q, self.k.mT)
        if self.hot is not None:
            self.hot_q = each(self._queries(q, k, layout, dtype, None)[self.hot.rows], self.group)
            self.hot_k = layout.split(k, dtype, share=share)[self.hot.rows]
            hot = hot_scores(self.hot_q.flatten(0, 1), *self._hot_keys(self.hot))
            self.scores[self.hot.rows] = hot.view(len(self.hot.rows), self.group * hot.shape[1], hot.shape[2])
        self.causal(self.scores)

    def _queries(self, q: Tensor, k: Tensor, layout: Layout, dtype: torch.dtype, decay: Decay | None) -> Tensor:
        """Return the rows [R,J*C,K] of all query heads, times the queries' decays if they are given."""
        heads = self.group - self.keys_too
        rows = stack(layout.split(q, dtype, 1.0 if decay is None else decay.query_heads(heads), self.share), heads)
        if not self.keys_too:
            return rows
        return torch.cat((rows, layout.split(k, dtype, 1.0 if decay is None else decay.query, self.share)), 1)

    def write(self, v: Tensor, state: Tensor, counts: list[int]) -> None:
        """Compute the states before each chunk and after the segment, from the values [R,C,V]."""
        self.v, self.update = v, torch.bmm(self.k.mT, v)
        if self.decay is not None:
            self.update *= self.decay.exit
        self.before, self.state = scan(self.update, self.total, state, counts)

    def causal(self, scores: Tensor) -> None:
        """Set the scores [R,J*C,C] to zero, in place, where the key is later than the query."""
        heads = each(scores, self.group)
        if self.keys_too:
            heads[:, -1].tril_(-1)
            heads = heads[:, :-1]
        heads.tril_()

    def fold(self, dq: Tensor, dk: Tensor, dg: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum the gradients of q, k and, if they are shared, g over the value heads that share a key head."""
        if self.share == 1:
            return dq, dk, dg
        dq, dk = (x.unflatten(0, (-1, self.share)).sum(1) for x in (dq, dk))
        return dq, dk, dg.unflatten(0, (-1, self.share)).sum(1) if dg is not None and self.shares_gates else dg

    def entering(self) -> Tensor:
        """Return the states before each chunk, decayed to the reference token."""
        return self.before if self.decay is None else self.before * self.decay.entry

    def _hot_keys(self, hot: Hot) -> tuple[Tensor, Tensor]:
        """Return the keys and running sums of the hot rows, repeated for every query head."""
        return self.hot_k.repeat_interleave(self.group, 0), hot.sums.repeat_interleave(self.group, 0)

    def hot_backward(self, hot: Hot, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of the hot rows' q [n,J,C,K], k [n,C,K] and log-decays [n,C,G] from their scores'."""
        k, sums = self._hot_keys(hot)
        dq, dk, dg = hot_scores_backward(each(dscores, self.group).flatten(0, 1), self.hot_q.flatten(0, 1), k, sums)
        dq, dk, dg = (x.unflatten(0, (-1, self.group)) for x in (dq, dk, dg))
        return dq, dk.sum(1), dg.sum(1)


def stack(rows: Tensor, group: int) -> Tensor:
    """View rows [R*J,C,D] of query heads as [R,J*C,D]."""
    return rows.view(rows.shape[0] // group, group * rows.shape[1], rows.shape[2])


def each(rows: Tensor, group: int) -> Tensor:
    """View rows [R,J*C,D] as [R,J,C,D]."""
    return rows.view(rows.shape[0], group, rows.shape[1] // group, rows.shape[2])


def new_outputs(q: Tensor, v: Tensor) -> Tensor:
    """Return an uninitialised output [B,T,max(Hq, Hv),V] in v's dtype."""
    return v.new_empty(*q.shape[:2], max(q.shape[2], v.shape[2]), v.shape[3])


@opaque_op("hybridattn::linear_attention_chunked")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs and states.

    Args:
        q: [B,T,J*H,K].
        k: [B,T,H,K].
        v: [B,T,Hv,V]; Hv is H or, with J = 1, a multiple of it.
        g: [B,T,Hv,K], [B,T,Hv,1], the same with H heads, or None.
        scale: factor of the outputs.
        taylor: if given, the scores are 1 + z + z^2 / 2 with z = taylor * q.k; g is None, and the states have P rows,
            one per packed feature, instead of K.
        state: [N,Hv,K,V].
        cu_seqlens: [N+1] or None.

    Returns:
        o [B,T,max(J*H, Hv),V] in v's dtype, final states, and the states before every segment [S,N,Hv,K,V].
    """
    dtype = compute_dtype(q, k, v, g)
    starts = state.new_empty(len(time_spans(q, v, cu_seqlens)), *state.shape)
    o, state = new_outputs(q, v), state.clone()
    if not len(starts):
        o.zero_()
    for n, (t, layout) in enumerate(time_segments(q, v, cu_seqlens)):
        starts[n] = state
        gt = None if g is None else g[:, t]
        r = Rows(q[:, t], k[:, t], gt, taylor, layout, dtype, v.shape[2] // max(k.shape[2], 1))
        r.write(layout.split(v[:, t], dtype), layout.sort(state), layout.counts)
        layout.join(torch.bmm(r.scores, r.v).baddbmm_(r.q, r.entering()), o[:, t], scale)
        state = layout.unsort(r.state)
    return o, state, starts


@forward.register_fake
def _(q, k, v, g, scale, taylor, state, cu_seqlens):
    starts = state.new_empty(len(time_spans(q, v, cu_seqlens)), *state.shape)
    return new_outputs(q, v), torch.empty_like(state), starts


@opaque_op("hybridattn::linear_attention_chunked_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without gates) and the initial state.

    Args:
        q, k, v, g, scale, taylor, cu_seqlens: as in ``forward``.
        starts: states before every segment, from ``forward``.
        do: gradient of the outputs.
        dstate: gradient of the final states.
    """
    dtype, dstate = compute_dtype(q, k, v, g), dstate.clone()
    gates = q.new_empty(0) if g is None else g
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gates)]
    with no_autocast(q):
        for (t, layout), start in reversed(list(zip(time_segments(q, v, cu_seqlens), starts, strict=True))):
            gt = None if g is None else g[:, t]
            r = Rows(q[:, t], k[:, t], gt, taylor, layout, dtype, v.shape[2] // max(k.shape[2], 1))
            r.write(layout.split(v[:, t], dtype), layout.sort(start), layout.counts)
            do_rows = stack(layout.split(do[:, t], dtype, scale), r.group)
            dq, dk, dv, dg, dstate = _backward_rows(r, do_rows, layout.sort(dstate), layout.counts)
            if r.raw is not None:
                pairs = zip(r.raw, (dq, dk), strict=True)
                dq, dk = (
                    features.taylor_backward(x, dx.view(*x.shape[:2], dx.shape[-1])).mul_(r.root) for x, dx in pairs
                )
            dq, dk, dg = r.fold(dq, dk, dg)
            for grad, rows in zip(grads, (dq, dk, dv, dg), strict=True):
                if rows is not None:
                    layout.join(rows, grad[:, t])
            dstate = layout.unsort(dstate)
    return grads[0], grads[1], grads[2], grads[3], dstate


@backward.register_fake
def _(q, k, v, g, scale, taylor, starts, cu_seqlens, do, dstate):
    gates = q.new_empty(0) if g is None else g
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gates)]
    return grads[0], grads[1], grads[2], grads[3], torch.empty_like(dstate)


def _backward_rows(
    r: Rows, do: Tensor, dstate: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Compute the gradients of the rows of q, k, v and g (None without gates), and of the states before the segment."""
    dentry = torch.bmm(r.q.mT, do)
    if r.decay is not None:
        dentry *= r.decay.entry
    after, dstate = scan_backward(dentry, r.total, dstate, counts)
    leaving = after if r.decay is None else after * r.decay.exit
    dv = torch.bmm(r.scores.mT, do).baddbmm_(r.k, leaving)
    dq, dk, dg = gradients_of_scores(r, do, dentry, after, leaving)
    return dq, dk, dv, dg, dstate


def gradients_of_scores(
    r: Rows, do: Tensor, dentry: Tensor, after: Tensor, leaving: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients of the rows of q, k and g (None without gates).

    Args:
        r: the segment.
        do: gradients of the outputs of all query heads, [R,J*C,V].
        dentry: gradients of the states before each chunk through these outputs, [R,K,V].
        after: gradients of the states after each chunk, [R,K,V].
        leaving: the same, decayed from the reference token.
    """
    dscores = torch.bmm(do, r.v.mT)
    r.causal(dscores)
    if r.hot is not None:
        dscores_hot = dscores[r.hot.rows]
        dscores[r.hot.rows] = 0
    dq = torch.bmm(dscores, r.k).baddbmm_(do, r.entering().mT)
    dk = torch.bmm(dscores.mT, r.q).baddbmm_(r.v, leaving.mT)
    if r.decay is None:
        return dq, dk, None
    gates = r.decay.total[..., 0]
    dtotal = per_gate((r.decay.total * r.before * after).sum(-1), gates)[:, None]
    dg = dtotal + _cool_dg(
        per_gate(each(dq * r.q, r.group).sum(1).sub_(dk * r.k), gates),
        per_gate((r.before * dentry).sum(-1), gates)[:, None],
        per_gate((r.update * after).sum(-1), gates)[:, None],
    )
    each(dq, r.group).mul_(r.decay.query[:, None])
    dk.mul_(r.decay.key)
    if r.hot is not None:
        rows = r.hot.rows
        dq_hot, dk_hot, dg_hot = r.hot_backward(r.hot, dscores_hot)
        dq_far, dk_far = each(dq[rows], r.group), dk[rows]  # through the states only: dscores of hot rows was set to 0
        dg_hot += dtotal[rows] + later(per_gate((dq_far * r.hot_q).sum(1), gates))
        dg[rows] = dg_hot + earlier(per_gate(dk_far * r.hot_k, gates))
        dq[rows] = (dq_far + dq_hot).flatten(1, 2)
        dk[rows] = dk_far + dk_hot
    return dq, dk, dg


def _cool_dg(dexponent: Tensor, dentry: Tensor, dexit: Tensor) -> Tensor:
    """Compute the gradient of the log-decays [R,C,G] of cool rows.

    Args:
        dexponent: gradient of the exponents b_t - b_mid, [R,C,G].
        dentry, dexit: gradients of the exponents b_mid and b_C - b_mid, [R,1,G].

    A gate up to the middle enters the exponents of earlier tokens with a minus sign. A gate after the middle enters
    the exponents of its own and later tokens.
    """
    halves = dexponent.unflatten(1, (2, -1))
    sums = halves.cumsum(2)
    first = dentry - (sums[:, 0] - halves[:, 0])
    second = dexit + sums[:, 1, -1:] - (sums[:, 1] - halves[:, 1])
    return torch.cat((first, second), 1)


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, ctx.taylor, _, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, output[2], cu_seqlens)


def _backward(ctx, do, dstate, _dstarts):
    q, k, v, g, starts, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(new_outputs(q, v)) if do is None else do
    dstate = starts.new_zeros(starts.shape[1:]) if dstate is None else dstate
    dq, dk, dv, dg, dstate = backward(q, k, v, g, ctx.scale, ctx.taylor, starts, cu_seqlens, do, dstate)
    return dq, dk, dv, None if g is None else dg, None, None, dstate, None


forward.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: float | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute outputs [B,T,max(J*H, Hv),V] in v's dtype and final states [N,Hv,K,V]; differentiable once.

    The arguments are those of ``forward``.
    """
    o, state, _ = forward(q, k, v, g, scale, taylor, state, cu_seqlens)
    return o, state
