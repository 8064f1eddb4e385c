"""The torch backend of the gated delta rule: in a chunk it is gated linear attention with other values.

Notation as in ``chunked``, with beta the strength of writing, S the state before the chunk, and the scores of the keys
as queries, L[t,s] = (k_t exp b_t) . (k_s exp -b_s) for s < t:

    u = (I + diag(beta) L)^-1 diag(beta) (v - (k exp b) S)

Then o and the next state are those of gated linear attention on (q, k, u). (Yang et al., "Gated Delta Networks"
(2025), section 3.3; Kimi Team, "Kimi Linear" (2025), section 3.) The keys are one more query head that sees earlier
tokens only, so scores, gates and gradients are those of ``chunked``. Backward, with w = (I + diag(beta) L)^-T du:

    -diag(beta) w is the gradient of the output of the keys as queries
    dv = diag(beta) w, and dbeta = w . (v - (k exp b) S - L u)

Between chunks, u = W - Y S and S <- D S + (k exp(b_C - b))^T u: two products per chunk that depend on the chunk before
it. Backward is alike. All other products are batched over the chunks of a segment.
"""

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.opaque_ops import opaque_op
from .chunked import Rows, gradients_of_scores, new_outputs, stack
from .chunks import Layout, time_segments, time_spans


class DeltaRows(Rows):
    """A segment of the gated delta rule: rows of gated linear attention whose values are u.

    ``sweep`` computes u, which the other operands and the scores do not depend on.
    """

    inter: Tensor  # the part of the outputs that comes from the states before each chunk, [R,J*C,V]

    def __init__(self, q, k, v, g, beta, layout: Layout, dtype: torch.dtype):
        super().__init__(q, k, g, None, layout, dtype, v.shape[2] // max(k.shape[2], 1), keys_too=True)
        chunk = self.k.shape[1]
        self.beta, self.given = layout.split(beta[..., None], dtype), layout.split(v, dtype)
        self.key_queries, self.key_scores = self.q[:, -chunk:], self.scores[:, -chunk:]
        system = self.key_scores * self.beta
        eye = torch.eye(chunk, dtype=dtype, device=system.device).expand_as(system)
        self.inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
        self.leaving_keys = self.k if self.decay is None else self.k * self.decay.exit.mT

    def sweep(self, state: Tensor, counts: list[int], keep: bool) -> None:
        """Compute u and the states after the segment, chunk by chunk.

        Args:
            state: initial states [N,H,K,V].
            counts: as in ``Layout``.
            keep: keep the states before each chunk and their updates, for the backward pass; otherwise compute
                ``inter`` while the states are at hand.
        """
        chunk, heads = self.k.shape[1], state.shape[1]
        solved = self.inverse * self.beta.mT
        reading = torch.bmm(solved, self.key_queries)
        if not keep:
            reading = torch.cat((reading, self.q[:, :-chunk]), 1)
        if self.decay is not None:
            reading *= self.decay.entry.mT
        self.v, state = torch.bmm(solved, self.given), state.flatten(0, 1).clone()
        kept = self.v.new_empty(len(self.v), *state.shape[1:] if keep else (reading.shape[1] - chunk, state.shape[2]))
        sizes = [n * heads for n in counts]
        totals = [None] * len(counts) if self.total is None else self.total.split(sizes)
        for u, y, k, place, total in zip(
            *(x.split(sizes) for x in (self.v, reading, self.leaving_keys, kept)), totals, strict=True
        ):
            running = state[: len(u)]
            if keep:
                place.copy_(running)
                u.baddbmm_(y, running, alpha=-1)
            else:
                read = torch.bmm(y, running)
                u.sub_(read[:, :chunk])
                place.copy_(read[:, chunk:])
            if total is not None:
                running.mul_(total)
            running.baddbmm_(k.mT, u)
        self.state = state.unflatten(0, (-1, heads))
        if keep:
            self.before, self.update = kept, torch.bmm(self.leaving_keys.mT, self.v)
        else:
            self.inter = kept

    def sweep_backward(self, du: Tensor, dentry: Tensor, dstate: Tensor, counts: list[int]):
        """Compute w [R,C,V], the gradients of the states after each chunk [R,K,V], and of the initial states.

        Args:
            du: gradients of u through the outputs of the chunk, [R,C,V].
            dentry: gradients of the states before each chunk through the outputs, [R,K,V].
            dstate: gradients of the final states [N,H,K,V].
            counts: as in ``Layout``.
        """
        heads = dstate.shape[1]
        dstate = dstate.flatten(0, 1).clone()
        queries = self.key_queries if self.decay is None else self.key_queries * self.decay.entry.mT
        w, left = self.inverse.mT @ du, self.inverse.mT @ self.leaving_keys
        back, after = queries * self.beta, torch.empty_like(dentry)
        sizes = [n * heads for n in counts]
        totals = [None] * len(counts) if self.total is None else self.total.split(sizes)
        steps = list(zip(*(x.split(sizes) for x in (w, left, back, dentry, after)), totals, strict=True))
        for part, keys, out, entry, kept, total in reversed(steps):
            running = dstate[: len(part)]
            kept.copy_(running)
            part.baddbmm_(keys, kept)
            if total is not None:
                running.mul_(total)
            running.add_(entry).baddbmm_(out.mT, part, alpha=-1)
        return w, after, dstate.unflatten(0, (-1, heads))


@opaque_op("hybridattn::gated_delta_rule_chunked")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs and states.

    Args:
        q: [B,T,J*H,K].
        k: [B,T,H,K].
        v: [B,T,Hv,V]; Hv is H or, with J = 1, a multiple of it.
        g: [B,T,Hv,K], [B,T,Hv,1], the same with H heads, or None.
        beta: [B,T,Hv].
        scale: factor of the outputs.
        state: [N,Hv,K,V].
        cu_seqlens: [N+1] or None.

    Returns:
        o [B,T,max(J*H, Hv),V] in v's dtype, final states, and the states before every segment [S,N,Hv,K,V].
    """
    dtype = compute_dtype(q, k, v, g, beta)
    starts = state.new_empty(len(time_spans(q, v, cu_seqlens)), *state.shape)
    o, state = new_outputs(q, v), state.clone()
    if not len(starts):
        o.zero_()
    for n, (t, layout) in enumerate(time_segments(q, v, cu_seqlens)):
        starts[n] = state
        gt = None if g is None else g[:, t]
        r = DeltaRows(q[:, t], k[:, t], v[:, t], gt, beta[:, t], layout, dtype)
        r.sweep(layout.sort(state), layout.counts, keep=False)
        layout.join(r.inter.baddbmm_(r.scores[:, : -r.k.shape[1]], r.v), o[:, t], scale)
        state = layout.unsort(r.state)
    return o, state, starts


@forward.register_fake
def _(q, k, v, g, beta, scale, state, cu_seqlens):
    starts = state.new_empty(len(time_spans(q, v, cu_seqlens)), *state.shape)
    return new_outputs(q, v), torch.empty_like(state), starts


@opaque_op("hybridattn::gated_delta_rule_chunked_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without gates), beta and the initial state.

    Args:
        q, k, v, g, beta, scale, cu_seqlens: as in ``forward``.
        starts: states before every segment, from ``forward``.
        do: gradient of the outputs.
        dstate: gradient of the final states.
    """
    dtype, dstate = compute_dtype(q, k, v, g, beta), dstate.clone()
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in _inputs(q, k, v, g, beta)]
    with no_autocast(q):
        for (t, layout), start in reversed(list(zip(time_segments(q, v, cu_seqlens), starts, strict=True))):
            gt = None if g is None else g[:, t]
            r = DeltaRows(q[:, t], k[:, t], v[:, t], gt, beta[:, t], layout, dtype)
            r.sweep(layout.sort(start), layout.counts, keep=True)
            do_rows = stack(layout.split(do[:, t], dtype, scale), r.group - 1)
            rows, dstate = _backward_rows(r, do_rows, layout.sort(dstate), layout.counts)
            for grad, part in zip(grads, rows, strict=True):
                if part is not None:
                    layout.join(part, grad[:, t])
            dstate = layout.unsort(dstate)
    dq, dk, dv, dg, dbeta = grads
    return dq, dk, dv, dg, dbeta.squeeze(-1), dstate


@backward.register_fake
def _(q, k, v, g, beta, scale, starts, cu_seqlens, do, dstate):
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _inputs(q, k, v, g, beta)]
    dq, dk, dv, dg, dbeta = grads
    return dq, dk, dv, dg, dbeta.squeeze(-1), torch.empty_like(dstate)


def _inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> list[Tensor]:
    """Return the tensors that have gradients, beta as [B,T,H,1]."""
    return [q, k, v, q.new_empty(0) if g is None else g, beta[..., None]]


def _backward_rows(r: DeltaRows, do: Tensor, dstate: Tensor, counts: list[int]) -> tuple[list[Tensor | None], Tensor]:
    """Compute the gradients of the rows of q, k, v, g (None without gates) and beta, and of the states before."""
    chunk = r.k.shape[1]
    entry = 1.0 if r.decay is None else r.decay.entry
    dentry = torch.bmm(r.q[:, :-chunk].mT, do) * entry
    w, after, dstate = r.sweep_backward(torch.bmm(r.scores[:, :-chunk].mT, do), dentry, dstate, counts)
    leaving = after if r.decay is None else after * r.decay.exit
    dv = r.beta * w
    dentry -= torch.bmm(r.key_queries.mT, dv) * entry
    dq, dk, dg = gradients_of_scores(r, torch.cat((do, -dv), 1), dentry, after, leaving)
    dk += dq[:, -chunk:]
    dq, dk, dg = r.fold(dq[:, :-chunk], dk, dg)
    written = r.given - torch.bmm(r.key_scores, r.v).baddbmm_(r.key_queries, r.entering())
    dbeta = (w * written).sum(-1, keepdim=True)
    return [dq.contiguous(), dk, dv, dg, dbeta], dstate


def _save(ctx, inputs, output) -> None:
    q, k, v, g, beta, ctx.scale, _, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, beta, output[2], cu_seqlens)


def _backward(ctx, do, dstate, _dstarts):
    q, k, v, g, beta, starts, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(new_outputs(q, v)) if do is None else do
    dstate = starts.new_zeros(starts.shape[1:]) if dstate is None else dstate
    dq, dk, dv, dg, dbeta, dstate = backward(q, k, v, g, beta, ctx.scale, starts, cu_seqlens, do, dstate)
    return dq, dk, dv, None if g is None else dg, dbeta, None, dstate, None


forward.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute outputs [B,T,max(J*H, Hv),V] in v's dtype and final states [N,Hv,K,V]; differentiable once.

    The arguments are those of ``forward``.
    """
    o, state, _ = forward(q, k, v, g, beta, scale, state, cu_seqlens)
    return o, state
