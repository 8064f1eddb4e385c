"""The public delta-rule operators: argument checks, choice of backend, grouped heads.

B batch, T time, H key heads, K key dim, V value dim, N sequences (B, or the number of sequences in ``cu_seqlens``).
"""

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend, compute_dtype, no_autocast
from ..runtime.checks import check_inference, check_layout, check_shape, check_tensors
from . import chunked_delta, reference
from .operands import check_gates, check_operands, check_scale, l2_normalize, match_heads
from .segment_state import check_strength
from .triton.launch import MOST_DELTA_TOKENS, delta_lacks, step_lacks


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute linear attention whose state is corrected towards each new value, with decay.

    ``S' = Diag(exp g_t) S_{t-1}``, ``S_t = S' + beta_t k_t^T (v_t - k_t S')``, ``o_t = scale * q_t S_t``. Without g
    this is DeltaNet: Yang et al., "Parallelizing Linear Transformers with the Delta Rule" (2024), section 2.2. With
    gates per head it is Gated DeltaNet: Yang et al., "Gated Delta Networks" (2025), section 3.1. With gates per channel
    it is Kimi Delta Attention: Kimi Team, "Kimi Linear" (2025), section 3.

    The state stays bounded where ``beta |k|^2 <= 2``: keys have a norm of 1 in these models (``normalize_qk``).

    Args:
        q: [B,T,Hq,K], any floating-point dtype; Hq is H, or a multiple of it if v has H heads.
        k: [B,T,H,K].
        v: [B,T,Hv,V]; Hv is H, or a multiple of it. Neighbouring value heads share a key head.
        g: natural-log decay <= 0 (-inf allowed), [B,T,Hv,K], [B,T,Hv] or [Hv], or the same with H heads; None for no
            decay.
        beta: strength of writing, 0 to 2, [B,T,Hv].
        scale: factor of q; K^-0.5 by default.
        normalize_qk: divide each query and key by ``sqrt(sum of squares + 1e-6)`` first.
        initial_state: fp32 [N,Hv,K,V]; zeros by default. Differentiable.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of g, beta and cu_seqlens (synchronises). On a CPU they are always
            checked.
        backend: ``"reference"``, ``"torch"``, ``"triton"`` or None: see ``choose_backend``.

    Returns:
        o [B,T,max(Hq, Hv),V] in v's dtype, and the final state [N,Hv,K,V], fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device, option, gate or beta is not as above.
    """
    sizes = check_operands(q, k, v, cu_seqlens, check_values)
    check_layout(q, k, v, cu_seqlens)
    g = None if g is None else check_gates(sizes, q, g, check_values)
    check_strength({**sizes, "H": sizes["Hs"]}, q, beta, check_values)
    scale = check_scale(scale, sizes)
    if initial_state is not None:
        check_shape(sizes, "initial_state", initial_state, "N Hs K V")
        check_tensors("q", q=q, initial_state=initial_state)
    q, k, v = autocast(q, k, v)
    o, state = _attend(sizes, q, k, v, g, beta, scale, normalize_qk, initial_state, cu_seqlens, backend)
    return o, state if output_final_state else None


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute ``gated_delta_rule`` for one or a few new tokens and update the state in place.

    Args:
        q, k, v, g, beta: as in ``gated_delta_rule``, a few tokens.
        state: [B,Hv,K,V]; overwritten with the state after the last token.
        scale, normalize_qk, check_values, backend: as in ``gated_delta_rule``.

    Returns:
        o [B,T,max(Hq, Hv),V] in v's dtype.

    Raises:
        ValueError: as ``gated_delta_rule``; also for inputs that require gradients.
    """
    sizes = check_operands(q, k, v, None, False)
    g = None if g is None else check_gates(sizes, q, g, check_values)
    check_strength({**sizes, "H": sizes["Hs"]}, q, beta, check_values)
    check_shape(sizes, "state", state, "B Hs K V")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state: expected float32 or float64, got {state.dtype}")
    check_tensors("q", q=q, state=state)
    check_inference("state", q, k, v, g, beta, state)
    scale = check_scale(scale, sizes)
    few = sizes["T"] <= MOST_DELTA_TOKENS or backend is not None
    chosen = choose_backend(backend, q, step_lacks(q, k, v, g, state, beta)) if few else None
    if chosen == "triton":
        from .triton import decode  # triton may be missing on a machine without a GPU

        return decode.delta_step(q, k, v, g, beta, scale, normalize_qk, state)
    if chosen in ("reference", None) or sizes["T"] != 1:
        o, after = _attend(sizes, q, k, v, g, beta, scale, normalize_qk, state, None, chosen)
        state.copy_(after)
        return o
    heads, dtype = state.shape[1], state.dtype
    qt, kt, vt = (x[:, 0].to(dtype) for x in (q, k, v))
    if normalize_qk:
        qt, kt = l2_normalize(qt), l2_normalize(kt)
    if g is not None:
        state.mul_(match_heads(g[:, 0, :, :, None].to(dtype).exp(), heads, 1))
    # One product reads the state for the key and for the query heads that share it.
    group = max(heads, qt.shape[1]) // heads
    queries = match_heads(qt, heads * group, 1).unflatten(1, (heads, group))
    keys = match_heads(kt, heads, 1)[:, :, None]
    with no_autocast(q):
        read = torch.cat((keys, queries), 2) @ state
        u = beta[:, 0, :, None, None].to(dtype) * (vt[:, :, None] - read[:, :, :1])
        state.addcmul_(keys.mT, u)
        o = read[:, :, 1:] + (queries * keys).sum(-1, keepdim=True) * u
    return (scale * o.flatten(1, 2))[:, None].to(v.dtype)


def _attend(sizes, q, k, v, g, beta, scale, normalize, state, cu_seqlens, backend) -> tuple[Tensor, Tensor]:
    backend = choose_backend(backend, q, delta_lacks(q, k, v, g, beta, state, normalize))
    if backend == "triton":
        from .triton import delta_op  # triton may be missing on a machine without a GPU

        with no_autocast(q):
            return delta_op.attend(q, k, v, g, beta, scale, normalize, state, cu_seqlens)
    dtype = compute_dtype(q, k, v, g, beta)
    if state is None:
        state = q.new_zeros(*(sizes[c] for c in ("N", "Hs", "K", "V")), dtype=dtype)
    state = state.to(dtype)
    with no_autocast(q):
        if normalize:
            q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
        attend = _repeated if backend == "reference" else chunked_delta.attend
        o, state = attend(q, k, v, g, beta, scale, state, cu_seqlens)
    return o.to(v.dtype), state


def _repeated(q, k, v, g, beta, scale, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Run the reference with shared heads repeated."""
    heads, states = max(q.shape[2], v.shape[2]), state.shape[1]
    q, k, v, beta = (match_heads(x, heads, 2) for x in (q, k, v, beta))
    g = None if g is None else match_heads(g, heads, 2)
    o, after = reference.attend(q, k, v, g, scale, match_heads(state, heads, 1), cu_seqlens, beta)
    return o, after if heads == states else after[:, :: heads // states]
