"""The public softmax-attention operators: argument checks and choice of backend.

B batch, Tq and Tk queries and keys, Hq query heads, H key/value heads, D key dim, V value dim.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend
from ..runtime.checks import check_flags, check_layout, check_shape, check_tensors, reads_values
from ..runtime.sequences import check_cu_seqlens
from . import blocked, reference
from .options import BlockMask, Options, check_block_mask, check_number, check_window
from .triton import launch

MOST_NEW_TOKENS = 16  # in one call of flash_decode; for more, flash_attention is faster


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block_mask: BlockMask | None = None,
    return_lse: Literal[False] = False,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block_mask: BlockMask | None = None,
    return_lse: Literal[True],
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block_mask: BlockMask | None = None,
    return_lse: bool = False,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax attention without a Tq x Tk tensor: ``o_t = softmax(scale * q_t k^T) v``.

    Dao, "FlashAttention-2" (2023). If Tq and Tk differ, the last query and the last key have the same position: query
    t is at position t + Tk - Tq. A query that attends to no key gets zeros. The torch backend runs full attention,
    causal attention and causal windows without further options on PyTorch's fused kernel, everything else on this
    package's blocked implementation.

    Args:
        q: [B,Tq,Hq,D], any floating-point dtype.
        k: [B,Tk,H,D]; Hq is a multiple of H, and Hq / H neighbouring query heads share a key head.
        v: [B,Tk,H,V].
        causal: a query attends to no later key.
        window: an integer, with ``causal``: a query attends to its own position and the ``window - 1`` before it. A
            pair (left, right): numbers of keys before and after its own position; right is 0 with ``causal``. So
            ``window=4`` is ``window=(3, 0)``. None: no window. Beltagy et al., "Longformer" (2020), section 3.1.
        scale: factor of the scores; D^-0.5 by default.
        cu_seqlens_q, cu_seqlens_k: integer offsets [N+1] of sequences packed into one row (B = 1); the offsets of the
            keys default to those of the queries.
        alibi_slopes: [Hq], not differentiable; ``slope * |t - s|`` is subtracted from the score of positions t and s.
            Press et al., "Train Short, Test Long" (2022), section 3.
        sinks: [Hq], differentiable; a score per head that is added to the softmax denominator and has no value, -inf
            for none. "gpt-oss-120b & gpt-oss-20b Model Card" (2025), section 2.2.
        softcap: positive; scores become ``softcap * tanh(score / softcap)``, before slopes and masks. "Gemma 2" (2024),
            section 2.
        block_mask: the key blocks that each query block attends to, within ``causal`` and ``window``; the same for all
            rows and heads; not for packed rows. Other key blocks are not computed.
        return_lse: also return the log-sum-exp.
        check_values: on a GPU, also check the values of offsets and block mask (synchronises). On a CPU they are
            always checked.
        backend: ``"reference"``, ``"torch"``, ``"triton"`` (CUDA tensors) or None (triton if it supports the call,
            else torch).

    Returns:
        o [B,Tq,Hq,V] in v's dtype; with ``return_lse`` the pair (o, lse). lse [B,Tq,Hq], fp32 (fp64 if an input is
        fp64), is the natural log of the softmax denominator of o, sink included; -inf for no keys and no sink. Both are
        differentiable once. Two calls on parts of the keys combine: ``lse = logaddexp(lse_1, lse_2)``,
        ``o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2``. Pass the sinks to one call only.

    Raises:
        ValueError: a shape, dtype, device, head ratio or option is not as above.
    """
    check_flags(causal=causal, return_lse=return_lse)
    sizes = _check(q, k, v, "B Tk H D")
    check_layout(q, k, v, cu_seqlens_q)
    _check_per_head(sizes, q, alibi_slopes, sinks)
    options = _options(sizes, causal, window, scale, alibi_slopes, sinks, softcap, block_mask)
    if block_mask is not None:
        if cu_seqlens_q is not None:
            raise ValueError("block_mask: expected None with cu_seqlens_q, got a block mask")
        check_block_mask(block_mask, sizes["Tq"], sizes["Tk"], q.device, check_values)
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q: expected offsets with cu_seqlens_k, got None")
    else:
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, sizes["B"], sizes["Tq"], check_values)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, sizes["B"], sizes["Tk"], check_values)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(f"cu_seqlens_k: expected shape {list(cu_seqlens_q.shape)}, got {list(cu_seqlens_k.shape)}")
    q, k, v = autocast(q, k, v)
    dtype = v.dtype
    q, k, v = _same_dtype(q, k, v)
    chosen = choose_backend(backend, q, launch.lacks(q, k, v))
    if chosen == "triton":
        from .triton.forward import attend  # triton may be missing on a machine without a GPU
    else:
        attend = {"reference": reference.attend, "torch": blocked.attend}[chosen]
    o, lse = attend(q, k, v, options, cu_seqlens_q, cu_seqlens_k, return_lse)
    return _results(o.to(dtype), lse, return_lse)


@overload
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    start_positions: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    start_positions: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    check_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    start_positions: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax attention of the newest tokens of every row over the row's key/value cache.

    The cache holds position p in slot p % S. So a cache with room for all positions holds position p in slot p, and a
    ring buffer holds the last S positions. Of n new tokens, token i is at position ``cache_lengths - n + i``. It
    attends to the positions up to its own that the cache still holds.

    Args:
        q: [B,n,Hq,D], n from 1 to 16.
        k_cache: [B,S,H,D]; already contains the keys of the new tokens.
        v_cache: [B,S,H,V].
        cache_lengths: integers [B], tokens of each row so far, the new ones included; may exceed S for a ring buffer. A
            call with n = 1 and without slopes, window and start_positions may pass S for a full ring buffer, since the
            order of its slots does not matter then.
        start_positions: integers [B]; no token of row b attends to a position before start_positions[b]; 0 by default.
        window: as in ``flash_attention``; with n > 1 a ring buffer needs at least ``window + n - 1`` slots.
        check_values: on a GPU, also check the values of the lengths (synchronises). On a CPU they are always checked.
        scale, alibi_slopes, sinks, softcap, return_lse: as in ``flash_attention``.
        backend: as in ``flash_attention``; ``"triton"`` has no gradients, so None chooses torch for inputs that
            require them.

    Returns:
        o [B,n,Hq,V] in q's dtype; with ``return_lse`` the pair (o, lse), lse [B,n,Hq] as in ``flash_attention``.

    Raises:
        ValueError: as in ``flash_attention``.
    """
    sizes = _check(q, k_cache, v_cache, "B S H D", "k_cache", "v_cache")
    _check_per_head(sizes, q, alibi_slopes, sinks)
    options = _options(sizes, True, window, scale, alibi_slopes, sinks, softcap, None)
    _check_lengths(sizes, q, cache_lengths, start_positions, options.left, check_values)
    inputs = _same_dtype(q, k_cache, v_cache)
    chosen = choose_backend(backend, q, launch.decode_lacks(*inputs, sinks))
    if chosen == "triton":
        from .triton.decode import decode  # triton may be missing on a machine without a GPU
    else:
        decode = {"reference": reference.decode, "torch": blocked.decode}[chosen]
    o, lse = decode(*inputs, cache_lengths, start_positions, options, return_lse)
    return _results(o.to(q.dtype), lse, return_lse)


def _results(o: Tensor, lse: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (o, lse) if return_lse and lse is not None else o


def _options(
    sizes: dict[str, int],
    causal: bool,
    window: int | tuple[int, int] | None,
    scale: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    block_mask: BlockMask | None,
) -> Options:
    check_number("scale", scale)
    check_number("softcap", softcap, positive=True)
    factor = 1 / math.sqrt(max(sizes["D"], 1)) if scale is None else scale
    return Options(factor, *check_window(window, causal), alibi_slopes, sinks, softcap, block_mask)


def _check(q: Tensor, k: Tensor, v: Tensor, keys: str, k_name: str = "k", v_name: str = "v") -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape(sizes, "q", q, "B Tq Hq D")
    check_shape(sizes, k_name, k, keys)
    check_shape(sizes, v_name, v, keys.replace("D", "V"))
    check_tensors("q", **{"q": q, k_name: k, v_name: v})
    if sizes["H"] == 0 or sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q: expected a multiple of the {sizes['H']} heads of {k_name}, got {sizes['Hq']}")
    return sizes


def _check_per_head(sizes: dict[str, int], q: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None:
            check_shape(sizes, name, x, "Hq")
    check_tensors("q", q=q, alibi_slopes=alibi_slopes, sinks=sinks)
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: expected a tensor without gradients, got requires_grad=True; use detach()")


def _check_lengths(
    sizes: dict[str, int],
    q: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    left: int | None,
    check_values: bool,
) -> None:
    """Check the number of new tokens, the lengths, the first positions and the ring buffer's size for a window."""
    new, slots = sizes["Tq"], sizes["S"]
    if not 1 <= new <= MOST_NEW_TOKENS:
        raise ValueError(f"q: expected 1 to {MOST_NEW_TOKENS} new tokens, got {new}; for more use flash_attention")
    given = {"cache_lengths": lengths} if starts is None else {"cache_lengths": lengths, "start_positions": starts}
    for name, x in given.items():
        check_shape(sizes, name, x, "B")
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} (that of q), got {x.device}")
        if reads_values(x, check_values) and bool((x < 0).any()):
            raise ValueError(f"{name}: expected integers >= 0, got {x.tolist()}")
    needed = 0 if left is None or new == 1 else left + new
    if slots < needed and reads_values(lengths, check_values) and bool((lengths > slots).any()):
        raise ValueError(
            f"k_cache: expected a ring buffer of at least {needed} slots (window + new tokens - 1), got {slots}"
        )


def _same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)
