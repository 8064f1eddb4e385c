"""The linear-attention operators: checks, choice of backend, and what all backends have in common.

Notation: B batch, T time, H heads, K key dim, V value dim, N sequences (B, or the number that ``cu_seqlens`` packs).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend, compute_dtype, no_autocast
from ..runtime.checks import check_inference, check_log_decay, check_shape, check_tensors
from ..runtime.sequences import check_cu_seqlens
from . import chunked, features, reference

EPS = 1e-12  # added to the normaliser
GATE_SHAPES = {1: "H", 3: "B T H", 4: "B T H K"}


class NormalizedState(NamedTuple):
    """State of a normalised operator: sum of k^T v, fp32 [N,H,K,V], and sum of k, fp32 [N,H,K]."""

    kv: Tensor
    k_sum: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """Causal linear attention: ``S_t = S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t``.

    Katharopoulos et al., "Transformers are RNNs" (2020), section 3; feature maps are the caller's.

    Args:
        q, k: [B,T,H,K], any floating-point dtype.
        v: [B,T,H,V].
        scale: factor of q; K^-0.5 by default.
        normalize: divide o_t by ``scale * q_t . sum_{s<=t} k_s + 1e-12``. The state is then a ``NormalizedState``.
        initial_state: fp32 [N,H,K,V], or the pair; zeros by default. Differentiable.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of cu_seqlens (synchronises); on a CPU they always are.
        backend: ``"reference"``, ``"torch"`` or None (the best there is).

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device or option is not as above; the message names it.
    """
    sizes = _check(q, k, v, cu_seqlens, check_values)
    q, k, v = autocast(q, k, v)
    if not normalize:
        o, state = _attend(sizes, q, k, v, None, _scale(scale, sizes), initial_state, cu_seqlens, backend)
        return o, state if output_final_state else None
    return _normalized(sizes, q, k, v, _scale(scale, sizes), initial_state, output_final_state, cu_seqlens, backend)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with decay: ``S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t``.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), section 4.

    Args:
        q, k: [B,T,H,K], any floating-point dtype.
        v: [B,T,H,V].
        g: natural-log decay <= 0 (-inf allowed), differentiable: [B,T,H,K] per channel (GLA), [B,T,H] per token and
            head (Mamba-2), or [H] constant (RetNet, TransNormerLLM).
        scale: factor of q; K^-0.5 by default.
        initial_state: fp32 [N,H,K,V]; zeros by default. Differentiable.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of g and cu_seqlens (synchronises); on a CPU they always are.
        backend: ``"reference"``, ``"torch"`` or None (the best there is).

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, fp32 (fp64 for fp64 inputs) [N,H,K,V], or None.

    Raises:
        ValueError: a shape, dtype, device, option or gate is not as above; the message names it.
    """
    sizes = _check(q, k, v, cu_seqlens, check_values)
    g = _check_gates(sizes, q, g, check_values)
    q, k, v = autocast(q, k, v)
    o, state = _attend(sizes, q, k, v, g, _scale(scale, sizes), initial_state, cu_seqlens, backend)
    return o, state if output_final_state else None


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """BASED's linear attention: weights ``1 + z + z^2 / 2`` of ``z = scale * q_t . k_s``, the Taylor series of exp(z).

    Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (2024), section 4.1.
    The weights are inner products of P = 1 + K + K (K + 1) / 2 packed features (see ``features``), which take the
    place of the keys in the state.

    Args:
        q, k: [B,T,H,K], any floating-point dtype; K is small, 8 to 24.
        v: [B,T,H,V].
        scale: factor of q.k, positive; K^-0.5 by default.
        normalize: divide o_t by the sum of its weights + 1e-12. The state is then a ``NormalizedState``.
        initial_state: [N,H,P,V], or the pair with [N,H,P]; zeros by default. Differentiable.
        output_final_state, cu_seqlens, check_values, backend: as in ``linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device or option is not as above; the message names it.
    """
    sizes = _check(q, k, v, cu_seqlens, check_values)
    taylor = _taylor_scale(scale, sizes)
    q, k, v = autocast(q, k, v)
    sizes["K"] = features.count(sizes["K"])
    if normalize:
        return _normalized(sizes, q, k, v, 1.0, initial_state, output_final_state, cu_seqlens, backend, taylor)
    o, state = _attend(sizes, q, k, v, None, 1.0, initial_state, cu_seqlens, backend, taylor)
    return o, state if output_final_state else None


def taylor_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | NormalizedState,
    *,
    scale: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``taylor_linear_attention`` for one or a few new tokens, the state updated in place.

    Args:
        q, k, v: as in ``taylor_linear_attention``, a few tokens.
        state: [B,H,P,V], or the pair if ``normalize``; overwritten with the state after the last token.
        scale, normalize, backend: as in ``taylor_linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as ``taylor_linear_attention``; also for inputs that require gradients.
    """
    sizes = _check(q, k, v, None, False)
    root = _taylor_scale(scale, sizes) ** 0.5
    dtype = compute_dtype(q, k, v)
    q, k = (features.taylor(x.to(dtype) * root) for x in (q, k))
    return linear_attention_step(q, k, v, state, scale=1.0, normalize=normalize, backend=backend)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | NormalizedState,
    *,
    scale: float | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``linear_attention`` for one or a few new tokens, the state updated in place.

    Args:
        q, k, v: as in ``linear_attention``, a few tokens.
        state: [B,H,K,V], or the pair if ``normalize``; overwritten with the state after the last token.
        scale, normalize, backend: as in ``linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as ``linear_attention``; also for inputs that require gradients.
    """
    sizes = _check(q, k, v, None, False)
    if not normalize:
        return _step(sizes, q, k, v, None, state, scale, backend)
    pair = _check_pair("state", state, sizes)
    qt, kt = q.to(pair.kv.dtype), k.to(pair.kv.dtype)
    sums = pair.k_sum[:, None] + kt.cumsum(1)
    o = _step(sizes, q, k, v.to(pair.kv.dtype), None, pair.kv, scale, backend)
    pair.k_sum.copy_(sums[:, -1] if sizes["T"] else pair.k_sum)
    normalizer = _scale(scale, sizes) * (qt * sums).sum(-1, keepdim=True)
    return (o / (normalizer + EPS)).to(v.dtype)


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``gated_linear_attention`` for one or a few new tokens, the state updated in place.

    Args:
        q, k, v, g: as in ``gated_linear_attention``, a few tokens.
        state: [B,H,K,V]; overwritten with the state after the last token.
        scale, check_values, backend: as in ``gated_linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as ``gated_linear_attention``; also for inputs that require gradients.
    """
    sizes = _check(q, k, v, None, False)
    return _step(sizes, q, k, v, _check_gates(sizes, q, g, check_values), state, scale, backend)


# ---------------------------------------------------------------------------------------------- common to the operators
def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, check_values: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape(sizes, "q", q, "B T H K")
    check_shape(sizes, "k", k, "B T H K")
    check_shape(sizes, "v", v, "B T H V")
    check_tensors("q", q=q, k=k, v=v)
    sizes["N"] = sizes["B"]
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, sizes["B"], sizes["T"], check_values)
        sizes["N"] = cu_seqlens.numel() - 1
    return sizes


def _check_gates(sizes: dict[str, int], q: Tensor, g: Tensor, check_values: bool) -> Tensor:
    """g as [B,T,H,K] or [B,T,H,1]."""
    if not isinstance(g, Tensor) or g.dim() not in GATE_SHAPES:
        given = list(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"g: expected shape [H], [B, T, H] or [B, T, H, K], got {given}")
    check_shape(sizes, "g", g, GATE_SHAPES[g.dim()])
    check_tensors("q", q=q, g=g)
    check_log_decay(g, check_values)
    if g.dim() == 4:
        return g
    return g.expand(sizes["B"], sizes["T"], sizes["H"])[..., None]


def _check_pair(name: str, state: Tensor | NormalizedState, sizes: dict[str, int]) -> NormalizedState:
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(
            f"{name}: expected a NormalizedState (kv, k_sum) with normalize=True, got {type(state).__name__}"
        )
    check_shape(sizes, f"{name}.kv", state[0], "N H K V")
    check_shape(sizes, f"{name}.k_sum", state[1], "N H K")
    return NormalizedState(*state)


def _join_state(state: NormalizedState) -> Tensor:
    return torch.cat((state.kv, state.k_sum[..., None]), -1)


def _taylor_scale(scale: float | None, sizes: dict[str, int]) -> float:
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    return _scale(scale, sizes)


def _scale(scale: float | None, sizes: dict[str, int]) -> float:
    return max(sizes["K"], 1) ** -0.5 if scale is None else scale


def _attend(sizes, q, k, v, g, scale, state, cu_seqlens, backend, taylor=None) -> tuple[Tensor, Tensor]:
    """Outputs and final states of one backend; with ``taylor`` the scores are 1 + z + z^2/2, z = taylor * q.k."""
    backend = choose_backend(backend)
    dtype = compute_dtype(q, k, v, g)
    if state is None:
        state = q.new_zeros(*(sizes[c] for c in "NHKV"), dtype=dtype)
    check_shape(sizes, "initial_state", state, "N H K V")
    check_tensors("q", q=q, initial_state=state)
    with no_autocast(q):
        if backend == "reference":
            if taylor is not None:
                q, k = (features.taylor(x.to(dtype) * taylor**0.5) for x in (q, k))
            o, state = reference.attend(q, k, v, g, scale, state.to(dtype), cu_seqlens)
        else:
            o, state = chunked.attend(q, k, v, g, scale, taylor, state.to(dtype), cu_seqlens)
    return o.to(v.dtype), state


def _normalized(sizes, q, k, v, scale, state, output_final_state, cu_seqlens, backend, taylor=None):
    """The normaliser is one more value column, of ones: its output is the sum of the weights, its state that of k."""
    joined = None if state is None else _join_state(_check_pair("initial_state", state, sizes))
    ones = v.new_ones(*v.shape[:-1], 1)
    columns = torch.cat((v, ones), -1).to(compute_dtype(v))
    sizes = {**sizes, "V": sizes["V"] + 1}
    o, state = _attend(sizes, q, k, columns, None, scale, joined, cu_seqlens, backend, taylor)
    o = (o[..., :-1] / (o[..., -1:] + EPS)).to(v.dtype)
    return o, NormalizedState(state[..., :-1], state[..., -1]) if output_final_state else None


def _step(sizes, q, k, v, g, state, scale, backend) -> Tensor:
    check_shape(sizes, "state", state, "B H K V")
    check_tensors("q", q=q, state=state)
    check_inference("state", q, k, v, g, state)
    if choose_backend(backend) == "reference" or sizes["T"] != 1:
        o, after = _attend(sizes, q, k, v, g, _scale(scale, sizes), state, None, backend)
        state.copy_(after)
        return o
    qt, kt, vt = (x[:, 0].to(state.dtype) for x in (q, k, v))
    if g is not None:
        state.mul_(g[:, 0, :, :, None].to(state.dtype).exp())
    state.addcmul_(kt[..., None], vt[..., None, :])
    with no_autocast(q):
        o = _scale(scale, sizes) * (qt[..., None, :] @ state)
    return o.transpose(1, 2).to(v.dtype)
