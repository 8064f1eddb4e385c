"""The softmax-attention operators: checks, choice of backend, packed rows.

Notation: B batch, Tq and Tk queries and keys, Hq query heads, H key/value heads, D key dim, V value dim.
"""

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend
from ..runtime.checks import check_shape, check_tensors
from ..runtime.sequences import check_cu_seqlens, sequence_slices
from . import blocked, reference


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention without the T x T matrix: ``o_t = softmax(scale * q_t k^T) v`` over the keys t may see.

    Dao, "FlashAttention-2" (2023). With different lengths the last query and the last key are the same moment. A
    query that sees no key gets zeros.

    Args:
        q: [B,Tq,Hq,D], any floating-point dtype.
        k: [B,Tk,H,D]; Hq is a multiple of H, and each key head serves Hq / H neighbouring query heads.
        v: [B,Tk,H,V].
        causal: a query sees no later key.
        window: a query sees itself and the ``window - 1`` keys before it (causal only); None is all of them.
        scale: factor of the scores; D^-0.5 by default.
        cu_seqlens_q, cu_seqlens_k: integer offsets [N+1] of sequences packed into one row (B = 1); keys default to
            the offsets of the queries.
        check_values: on a GPU, also check the values of the offsets (synchronises); on a CPU they always are.
        backend: ``"reference"``, ``"torch"`` or None (the best there is).

    Returns:
        o [B,Tq,Hq,V] in v's dtype.

    Raises:
        ValueError: a shape, dtype, device, head ratio or option is not as above; the message names it.
    """
    sizes = _check(q, k, v, "B Tk H D")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
        raise ValueError(f"window: expected a positive integer or None, got {window!r}")
    if window is not None and not causal:
        raise ValueError("window: expected None without causal=True, got a window")
    run = {"reference": reference.attend, "torch": blocked.attend}[choose_backend(backend)]
    q, k, v = autocast(q, k, v)
    options = {"causal": causal, "window": window, "scale": sizes["D"] ** -0.5 if scale is None else scale}
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q: expected offsets beside cu_seqlens_k, got None")
        return run(*_same_dtype(q, k, v), **options).to(v.dtype)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, sizes["B"], sizes["Tq"], check_values)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, sizes["B"], sizes["Tk"], check_values)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_k: expected shape {list(cu_seqlens_q.shape)}, got {list(cu_seqlens_k.shape)}")
    q, k, v = _same_dtype(q, k, v)
    spans = zip(sequence_slices(cu_seqlens_q), sequence_slices(cu_seqlens_k), strict=True)
    parts = [run(q[:, a], k[:, b], v[:, b], **options).to(v.dtype) for a, b in spans]
    rest = sizes["Tq"] - sum(part.shape[1] for part in parts)
    return torch.cat((*parts, v.new_zeros(1, rest, sizes["Hq"], sizes["V"])), 1)


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of one new token per row against a key/value cache.

    Args:
        q: [B,1,Hq,D].
        k_cache: [B,S,H,D]; the new token's key is already in it.
        v_cache: [B,S,H,V].
        cache_lengths: integers [B], 1 to S: row b attends to its slots 0 .. cache_lengths[b] - 1. Their order does not
            matter, so a full ring buffer has length S.
        scale, backend: as in ``flash_attention``.

    Returns:
        o [B,1,Hq,V] in q's dtype.

    Raises:
        ValueError: as ``flash_attention``.
    """
    sizes = {"Tq": 1}
    check_shape(sizes, "q", q, "B Tq Hq D")
    sizes = _check(q, k_cache, v_cache, "B S H D", "k_cache", "v_cache")
    check_shape(sizes, "cache_lengths", cache_lengths, "B")
    factor = sizes["D"] ** -0.5 if scale is None else scale
    if choose_backend(backend) == "torch":
        return blocked.decode(*_same_dtype(q, k_cache, v_cache), cache_lengths, factor).to(q.dtype)
    rows = [
        reference.attend(
            q[b, None], k_cache[b, None, :n], v_cache[b, None, :n], causal=False, window=None, scale=factor
        )
        for b, n in enumerate(cache_lengths.tolist())
    ]
    return torch.cat(rows).to(q.dtype) if rows else q.new_zeros(0, 1, sizes["Hq"], sizes["V"])


def _check(q: Tensor, k: Tensor, v: Tensor, keys: str, k_name: str = "k", v_name: str = "v") -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape(sizes, "q", q, "B Tq Hq D")
    check_shape(sizes, k_name, k, keys)
    check_shape(sizes, v_name, v, keys.replace("D", "V"))
    check_tensors("q", **{"q": q, k_name: k, v_name: v})
    if sizes["H"] == 0 or sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q: expected a multiple of {k_name}'s {sizes['H']} heads, got {sizes['Hq']}")
    return sizes


def _same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)
