"""The public linear-attention operators: argument checks, choice of backend, normalisation, grouped heads.

B batch, T time, H heads, K key dim, V value dim, N sequences (B, or the number of sequences in ``cu_seqlens``).
"""

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend, compute_dtype, no_autocast
from ..runtime.checks import check_flags, check_inference, check_layout, check_shape, check_tensors, reads_values
from . import chunked, features, reference
from .operands import (
    NormalizedState,
    check_gates,
    check_operands,
    check_pair,
    check_scale,
    join_state,
    match_heads,
    taylor_scale,
)
from .segment_state import linear_attention_state
from .triton.launch import MOST_TOKENS, chunk_lacks, step_lacks

EPS = 1e-12  # added to the normaliser, against division by 0


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
    """Compute causal linear attention: ``S_t = S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t``.

    Katharopoulos et al., "Transformers are RNNs" (2020), section 3. The caller applies the feature map to q and k.

    Args:
        q, k: [B,T,H,K], any floating-point dtype.
        v: [B,T,H,V].
        scale: factor of q; K^-0.5 by default.
        normalize: divide o_t by ``scale * q_t . sum_{s<=t} k_s + 1e-12``. The state is then a ``NormalizedState``.
        initial_state: fp32 [N,H,K,V], or a ``NormalizedState`` with ``normalize``; zeros by default. Differentiable.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of cu_seqlens (synchronises). On a CPU they are always checked.
        backend: ``"reference"``, ``"torch"``, ``"triton"`` (CUDA tensors) or None (triton if it supports the call,
            else torch).

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    check_flags(normalize=normalize, output_final_state=output_final_state)
    sizes = check_operands(q, k, v, cu_seqlens, check_values)
    check_layout(q, k, v, cu_seqlens)
    q, k, v = autocast(q, k, v)
    if not normalize:
        o, state = _attend(sizes, q, k, v, None, check_scale(scale, sizes), initial_state, cu_seqlens, backend)
        return o, state if output_final_state else None
    return _normalized(
        sizes, q, k, v, check_scale(scale, sizes), initial_state, output_final_state, cu_seqlens, backend
    )


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
    """Compute causal linear attention with decay.

    ``S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t``, ``o_t = scale * q_t S_t``.

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
        check_values: on a GPU, also check the values of g and cu_seqlens (synchronises). On a CPU they are always
            checked.
        backend: as in ``linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype, and the final state [N,H,K,V], fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device, option or gate is not as above.
    """
    check_flags(output_final_state=output_final_state)
    sizes = check_operands(q, k, v, cu_seqlens, check_values)
    check_layout(q, k, v, cu_seqlens)
    g = check_gates(sizes, q, g, check_values)
    q, k, v = autocast(q, k, v)
    o, state = _attend(sizes, q, k, v, g, check_scale(scale, sizes), initial_state, cu_seqlens, backend)
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
    """Compute BASED's linear attention: the weights are ``1 + z + z^2 / 2`` with ``z = scale * q_t . k_s``.

    The weights approximate exp(z) by its Taylor series. Arora et al., "Simple linear attention language models balance
    the recall-throughput tradeoff" (2024), section 4.1. They are inner products of P = 1 + K + K (K + 1) / 2 packed
    features (module ``features``), so the state has P rows instead of K.

    Args:
        q, k: [B,T,H,K], any floating-point dtype; K is small, usually 8 to 24.
        v: [B,T,H,V].
        scale: factor of q.k, positive; K^-0.5 by default.
        normalize: divide o_t by the sum of its weights + 1e-12. The state is then a ``NormalizedState``.
        initial_state: fp32 [N,H,P,V], with ``normalize`` a ``NormalizedState`` of [N,H,P,V] and [N,H,P]; zeros by
            default. Differentiable.
        output_final_state, cu_seqlens, check_values, backend: as in ``linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, fp32 (fp64 for fp64 inputs), or None.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    check_flags(normalize=normalize, output_final_state=output_final_state)
    sizes = check_operands(q, k, v, cu_seqlens, check_values)
    check_layout(q, k, v, cu_seqlens)
    taylor = taylor_scale(scale, sizes)
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
    """Compute ``taylor_linear_attention`` of one or a few new tokens and update the state in place.

    Args:
        q, k, v: as in ``taylor_linear_attention``, a few tokens.
        state: [B,H,P,V], or a ``NormalizedState`` with ``normalize``; becomes the state after the last token.
        scale, normalize, backend: as in ``taylor_linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as in ``taylor_linear_attention``; also if an input requires a gradient.
    """
    sizes = check_operands(q, k, v, None, False)
    root = taylor_scale(scale, sizes) ** 0.5
    dtype = compute_dtype(q, k, v)
    q, k = (features.taylor(x.to(dtype) * root) for x in (q, k))
    return linear_attention_step(q, k, v, state, scale=1.0, normalize=normalize, backend=backend)


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: Tensor | NormalizedState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | NormalizedState | None]:
    """Compute JRT's prefix linear attention: ``taylor_linear_attention`` in which all tokens also attend to a prefix.

    Arora et al., "Just read twice: closing the recall gap for recurrent language models" (2024), section 4. The prefix
    has its own keys and values. Every token attends to all of them, also a token at an earlier position. The final
    state is the sum over prefix and tokens, so ``taylor_linear_attention`` and its step continue from it.

    Args:
        q, k, v: as in ``taylor_linear_attention``.
        k_prefix: keys of the prefix, [N,M,H,K].
        v_prefix: values of the prefix, [N,M,Hv,V], heads as in v.
        prefix_lengths: integers [N], 0 to M: tokens of each sequence's prefix, counted from the first; M by default.
        scale, normalize, initial_state, output_final_state, cu_seqlens, check_values, backend: as in
            ``taylor_linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, prefix included, or None.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    sizes = check_operands(q, k, v, cu_seqlens, check_values)
    check_layout(q, k, v, cu_seqlens)
    check_shape(sizes, "k_prefix", k_prefix, "N M H K")
    check_shape(sizes, "v_prefix", v_prefix, "N M Hv V")
    check_tensors("q", q=q, k_prefix=k_prefix, v_prefix=v_prefix)
    if prefix_lengths is None:
        prefix_lengths = torch.full((sizes["N"],), sizes["M"], device=q.device)
    check_shape(sizes, "prefix_lengths", prefix_lengths, "N")
    if prefix_lengths.dtype not in (torch.int32, torch.int64) or prefix_lengths.device != q.device:
        raise ValueError(
            f"prefix_lengths: expected int32 or int64 on {q.device}, got {prefix_lengths.dtype} on "
            f"{prefix_lengths.device}"
        )
    outside = (prefix_lengths < 0) | (prefix_lengths > sizes["M"])
    if reads_values(prefix_lengths, check_values) and bool(outside.any()):
        raise ValueError(f"prefix_lengths: expected 0 to {sizes['M']}, got {prefix_lengths.tolist()}")
    inside = torch.arange(sizes["M"], device=q.device) < prefix_lengths[:, None]
    k_prefix, v_prefix = autocast(k_prefix, v_prefix)
    taylor = taylor_scale(scale, sizes)
    # Masking sets the values and the normaliser's ones to zero: a key that is set to zero still has the feature 1.
    columns = torch.cat((v_prefix, v_prefix.new_ones(*v_prefix.shape[:3], 1)), -1) * inside[:, :, None, None]
    sizes["K"] = features.count(k_prefix.shape[-1])
    if choose_backend(backend, q, chunk_lacks(q, k_prefix, columns, None, None, sizes["K"])) == "triton":
        # The outputs are unused. But the kernel never stores the features, which are ten times as large as the keys.
        _, state = _attend(sizes, k_prefix, k_prefix, columns, None, 1.0, None, None, "triton", taylor)
    else:
        dtype = compute_dtype(k_prefix, v_prefix)
        phi = match_heads(features.taylor(k_prefix.to(dtype) * taylor**0.5), sizes["Hs"], 2)
        state = linear_attention_state(phi, columns.to(dtype)).state
    if normalize:
        if initial_state is not None:
            state = state + join_state(check_pair("initial_state", initial_state, sizes))
        start = NormalizedState(state[..., :-1], state[..., -1])
    else:
        start = state[..., :-1]
        if isinstance(initial_state, Tensor):
            check_shape(sizes, "initial_state", initial_state, "N Hs K V")
            start = start + initial_state
        elif initial_state is not None:
            raise ValueError("initial_state: expected a tensor [N, H, P, V] with normalize=False, got a pair")
    return taylor_linear_attention(
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        initial_state=start,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


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
    """Compute ``linear_attention`` of one or a few new tokens and update the state in place.

    Args:
        q, k, v: as in ``linear_attention``, a few tokens.
        state: [B,H,K,V], or a ``NormalizedState`` with ``normalize``; becomes the state after the last token.
        scale, normalize, backend: as in ``linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as in ``linear_attention``; also if an input requires a gradient.
    """
    sizes = check_operands(q, k, v, None, False)
    if not normalize:
        return _step(sizes, q, k, v, None, state, scale, backend)
    pair = check_pair("state", state, sizes)
    check_inference("state", pair.k_sum)  # before either of the two tensors is updated
    dtype, heads = pair.kv.dtype, pair.kv.shape[1]
    sums = pair.k_sum[:, None] + match_heads(k.to(dtype).cumsum(1), heads, 2)
    o = _step(sizes, q, k, v.to(dtype), None, pair.kv, scale, backend)
    pair.k_sum.copy_(sums[:, -1] if sizes["T"] else pair.k_sum)
    normalizer = (match_heads(q.to(dtype), o.shape[2], 2) * match_heads(sums, o.shape[2], 2)).sum(-1, keepdim=True)
    return (o / (check_scale(scale, sizes) * normalizer + EPS)).to(v.dtype)


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
    """Compute ``gated_linear_attention`` of one or a few new tokens and update the state in place.

    Args:
        q, k, v, g: as in ``gated_linear_attention``, a few tokens.
        state: [B,H,K,V]; becomes the state after the last token.
        scale, check_values, backend: as in ``gated_linear_attention``.

    Returns:
        o [B,T,H,V] in v's dtype.

    Raises:
        ValueError: as in ``gated_linear_attention``; also if an input requires a gradient.
    """
    sizes = check_operands(q, k, v, None, False)
    return _step(sizes, q, k, v, check_gates(sizes, q, g, check_values), state, scale, backend)


# ----------------------------------------------------------------------------------------- helpers of all the operators
def _attend(sizes, q, k, v, g, scale, state, cu_seqlens, backend, taylor=None, wide=False) -> tuple[Tensor, Tensor]:
    """Compute outputs and final states on the chosen backend.

    With ``wide`` the outputs are fp32 or wider. With ``taylor`` the scores are 1 + z + z^2/2, z = taylor * q.k.
    """
    if state is not None:
        check_shape(sizes, "initial_state", state, "N Hs K V")
        check_tensors("q", q=q, initial_state=state)
    backend = choose_backend(backend, q, chunk_lacks(q, k, v, g, state, sizes["K"]))
    if backend == "triton":
        from .triton import op  # triton may be missing on a machine without a GPU

        with no_autocast(q):
            return op.forward(q, k, v, g, taylor or scale, taylor is not None, wide, state, cu_seqlens)
    dtype = compute_dtype(q, k, v, g)
    v = v.to(dtype) if wide else v
    if state is None:
        state = q.new_zeros(*(sizes[c] for c in ("N", "Hs", "K", "V")), dtype=dtype)
    with no_autocast(q):
        if backend == "reference":
            if taylor is not None:
                q, k = (features.taylor(x.to(dtype) * taylor**0.5) for x in (q, k))
            o, state = _repeated(q, k, v, g, scale, state.to(dtype), cu_seqlens)
        else:
            o, state = _grouped(q, k, v, g, scale, taylor, state.to(dtype), cu_seqlens)
    return o.to(v.dtype), state


def _repeated(q, k, v, g, scale, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Run the reference, with shared heads repeated."""
    heads, states = max(q.shape[2], v.shape[2]), state.shape[1]
    q, k, v = (match_heads(x, heads, 2) for x in (q, k, v))
    g = None if g is None else match_heads(g, heads, 2)
    o, after = reference.attend(q, k, v, g, scale, match_heads(state, heads, 1), cu_seqlens)
    return o, after if heads == states else after[:, :: heads // states]


def _grouped(q, k, v, g, scale, taylor, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Run the chunked backend; value heads that share a key head and its gates become columns of one head."""
    keys, values = k.shape[2], v.shape[2]
    if values == keys or (g is not None and g.shape[2] == values):
        return chunked.attend(q, k, v, g, scale, taylor, state, cu_seqlens)
    group = values // keys
    v, state = v.unflatten(2, (keys, group)), state.unflatten(1, (keys, group))
    columns = state.transpose(2, 3).flatten(3)
    o, after = chunked.attend(q, k, v.flatten(3), g, scale, taylor, columns, cu_seqlens)
    return o.view(*o.shape[:2], values, v.shape[-1]), after.unflatten(3, (group, -1)).transpose(2, 3).flatten(1, 2)


def _normalized(sizes, q, k, v, scale, state, output_final_state, cu_seqlens, backend, taylor=None):
    """Compute normalised outputs by means of one more value column, of ones.

    The output of that column is the sum of the weights; its state is the sum of k.
    """
    joined = None if state is None else join_state(check_pair("initial_state", state, sizes))
    ones = v.new_ones(*v.shape[:-1], 1)
    columns = torch.cat((v, ones), -1)
    sizes = {**sizes, "V": sizes["V"] + 1}
    o, state = _attend(sizes, q, k, columns, None, scale, joined, cu_seqlens, backend, taylor, wide=True)
    o = (o[..., :-1] / (o[..., -1:] + EPS)).to(v.dtype)
    return o, NormalizedState(state[..., :-1], state[..., -1]) if output_final_state else None


def _step(sizes, q, k, v, g, state, scale, backend) -> Tensor:
    check_shape(sizes, "state", state, "B Hs K V")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state: expected float32 or float64, got {state.dtype}")
    check_tensors("q", q=q, state=state)
    check_inference("state", q, k, v, g, state)
    scale = check_scale(scale, sizes)
    few = sizes["T"] <= MOST_TOKENS or backend is not None
    chosen = choose_backend(backend, q, step_lacks(q, k, v, g, state)) if few else None
    if chosen == "triton":
        from .triton import decode  # triton may be missing on a machine without a GPU

        return decode.step(q, k, v, g, scale, state)
    if chosen in ("reference", None) or sizes["T"] != 1:
        o, after = _attend(sizes, q, k, v, g, scale, state, None, chosen)
        state.copy_(after)
        return o
    qt, kt, vt = (x[:, 0].to(state.dtype) for x in (q, k, v))
    heads = state.shape[1]
    if g is not None:
        state.mul_(match_heads(g[:, 0, :, :, None].to(state.dtype).exp(), heads, 1))
    state.addcmul_(match_heads(kt, heads, 1)[..., None], vt[..., None, :])
    with no_autocast(q):  # query heads that share a state are rows of one matrix product
        o = match_heads(qt, max(heads, qt.shape[1]), 1).reshape(*state.shape[:2], -1, state.shape[2]) @ state
    return (scale * o.flatten(1, 2))[:, None].to(v.dtype)
