"""The softmax-attention operators: checks, choice of backend, packed rows.

Notation: B batch, Tq and Tk queries and keys, Hq query heads, H key/value heads, D key dim, V value dim.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..runtime.backend import autocast, choose_backend
from ..runtime.checks import check_layout, check_shape, check_tensors, reads_values
from ..runtime.sequences import check_cu_seqlens
from . import blocked, reference
from .options import BlockMask, Options, check_block_mask, check_number, check_window
from .triton import launch

MOST_NEW_TOKENS = 16  # of one flash_decode: beyond, flash_attention is the faster operator


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
    """Softmax attention without the T x T matrix: ``o_t = softmax(scale * q_t k^T) v`` over the keys t may see.

    Dao, "FlashAttention-2" (2023). With different lengths the last query and the last key are the same moment: query t
    is at position t + Tk - Tq. A query that sees no key gets zeros. Plain attention and plain causal windows run on
    PyTorch's fused kernel, all else on blocks of this package's own; neither makes a Tq x Tk tensor.

    Args:
        q: [B,Tq,Hq,D], any floating-point dtype.
        k: [B,Tk,H,D]; Hq is a multiple of H, and each key head serves Hq / H neighbouring query heads.
        v: [B,Tk,H,V].
        causal: a query sees no later key.
        window: number of keys that a query sees, itself and the ``window - 1`` before it (causal only); or a pair
            (left, right) of numbers of keys before and after itself, with right 0 if causal. So ``window=4`` is
            ``window=(3, 0)``. None: all keys. Beltagy et al., "Longformer" (2020), section 3.1.
        scale: factor of the scores; D^-0.5 by default.
        cu_seqlens_q, cu_seqlens_k: integer offsets [N+1] of sequences packed into one row (B = 1); keys default to
            the offsets of the queries.
        alibi_slopes: [Hq], not differentiable: ``slope * |t - s|``, a distance of positions, is taken off the scores.
            Press et al., "Train Short, Test Long" (2022), section 3.
        sinks: [Hq], differentiable: a score that joins the softmax denominator of its head and has no value; -inf for
            a head without. "gpt-oss-120b & gpt-oss-20b Model Card" (2025), section 2.2.
        softcap: positive: scores become ``softcap * tanh(score / softcap)``, before slopes and masks. "Gemma 2" (2024),
            section 2.
        block_mask: the key blocks each query block sees of those it may see otherwise; one for all rows and heads, not
            for packed rows. The others are not visited.
        return_lse: also return the log-sum-exp.
        check_values: on a GPU, also check the values of offsets and block mask (synchronises); on a CPU always.
        backend: ``"reference"``, ``"torch"``, ``"triton"`` (CUDA tensors) or None (the best there is).

    Returns:
        o [B,Tq,Hq,V] in v's dtype; with ``return_lse`` the pair of it and lse [B,Tq,Hq], fp32 (fp64 if an input is):
        the natural log of the softmax denominator that o was divided by, the sink included; -inf where that is empty.
        Differentiable once, both. So parts of the keys combine, if the sinks are given to one of them only, to
        ``lse = logaddexp(lse_1, lse_2)``, ``o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2``.

    Raises:
        ValueError: a shape, dtype, device, head ratio or option is not as above; the message names it.
    """
    sizes = _check(q, k, v, "B Tk H D")
    check_layout(q, k, v, cu_seqlens_q)
    _check_per_head(sizes, q, alibi_slopes, sinks)
    options = _options(sizes, causal, window, scale, alibi_slopes, sinks, softcap, block_mask)
    if block_mask is not None:
        if cu_seqlens_q is not None:
            raise ValueError("block_mask: expected None beside cu_seqlens_q, got a block mask")
        check_block_mask(block_mask, sizes["Tq"], sizes["Tk"], q.device, check_values)
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q: expected offsets beside cu_seqlens_k, got None")
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
        from .triton.forward import attend  # who has no GPU may have no triton
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
    """Softmax attention of the newest tokens of every row against its key/value cache.

    The cache keeps position p in slot p % S: a cache that is never full keeps it in slot p, and a ring buffer the last
    S positions. Of n new tokens, token i is at position ``cache_lengths - n + i`` and sees the positions up to its own
    that are still kept.

    Args:
        q: [B,n,Hq,D], n from 1 to 16.
        k_cache: [B,S,H,D]; the new tokens' keys are already in it.
        v_cache: [B,S,H,V].
        cache_lengths: integers [B]: tokens that each row has had, the new ones included; more than S for a ring buffer.
            One token without slopes, window and start_positions may also give S, since order does not matter to it.
        start_positions: integers [B]: nobody in row b sees a position before start_positions[b]; 0 by default.
        window: as in ``flash_attention``; several tokens need a ring buffer of at least ``window + n - 1`` slots.
        check_values: on a GPU, also check the values of the lengths (synchronises); on a CPU they always are.
        scale, alibi_slopes, sinks, softcap, return_lse: as in ``flash_attention``.
        backend: as in ``flash_attention``; ``"triton"`` has no gradients, and None is another where they are needed.

    Returns:
        o [B,n,Hq,V] in q's dtype; with ``return_lse`` the pair of it and lse [B,n,Hq], as in ``flash_attention``.

    Raises:
        ValueError: as ``flash_attention``.
    """
    sizes = _check(q, k_cache, v_cache, "B S H D", "k_cache", "v_cache")
    _check_per_head(sizes, q, alibi_slopes, sinks)
    options = _options(sizes, True, window, scale, alibi_slopes, sinks, softcap, None)
    _check_lengths(sizes, q, cache_lengths, start_positions, options.left, check_values)
    inputs = _same_dtype(q, k_cache, v_cache)
    chosen = choose_backend(backend, q, launch.decode_lacks(*inputs, sinks))
    if chosen == "triton":
        from .triton.decode import decode  # who has no GPU may have no triton
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
        raise ValueError(f"q: expected a multiple of {k_name}'s {sizes['H']} heads, got {sizes['Hq']}")
    return sizes


def _check_per_head(sizes: dict[str, int], q: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None:
            check_shape(sizes, name, x, "Hq")
    check_tensors("q", q=q, alibi_slopes=alibi_slopes, sinks=sinks)
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: expected a tensor without gradients, got requires_grad=True; detach() it")


def _check_lengths(
    sizes: dict[str, int],
    q: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    left: int | None,
    check_values: bool,
) -> None:
    """Of ``flash_decode``: the number of new tokens, the lengths, the first positions and the room for a window."""
    new, slots = sizes["Tq"], sizes["S"]
    if not 1 <= new <= MOST_NEW_TOKENS:
        raise ValueError(f"q: expected 1 to {MOST_NEW_TOKENS} new tokens, got {new}; flash_attention takes more")
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
