"""Reference implementation of linear attention: the recurrence, token by token. It is never optimised.

B batch, T time, H heads, K key dim, V value dim; per head the state S is K x V:

    S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", section 4; without g this is
Katharopoulos et al., "Transformers are RNNs", section 3.
"""

import torch
from torch import Tensor

from ..runtime.sequences import sequence_slices


def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute outputs and final states, in the state's dtype; differentiable by autograd.

    Args:
        q, k: [B,T,H,K].
        v: [B,T,H,V].
        g: natural-log decays [B,T,H,K] or [B,T,H,1], or None.
        scale: factor of q.
        state: initial states [N,H,K,V].
        cu_seqlens: offsets [N+1] of packed sequences, or None.

    Returns:
        o [B,T,H,V] and final states [N,H,K,V].
    """
    if cu_seqlens is not None:
        outputs, states = [], []
        for n, span in enumerate(sequence_slices(cu_seqlens)):
            part = [None if x is None else x[:, span] for x in (q, k, v, g)]
            o, s = attend(part[0], part[1], part[2], part[3], scale, state[n : n + 1], None)  # pyright: ignore
            outputs.append(o)
            states.append(s)
        rest = v.shape[1] - int(cu_seqlens[-1])
        outputs.append(state.new_zeros(1, rest, *v.shape[2:]))
        return torch.cat(outputs, 1), torch.cat(states) if states else state
    outputs = []
    for t in range(q.shape[1]):
        qt, kt, vt = (x[:, t].to(state.dtype) for x in (q, k, v))
        if g is not None:
            state = g[:, t].to(state.dtype).exp().unsqueeze(-1) * state
        state = state + kt.unsqueeze(-1) * vt.unsqueeze(-2)
        outputs.append(scale * (qt.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else state.new_zeros(v.shape), state
