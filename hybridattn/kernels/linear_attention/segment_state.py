"""The state that a segment of a sequence contributes, and merging of such states (for segments, ranks, prefixes)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.checks import check_log_decay, check_shape, check_tensors, reads_values
from ..runtime.sequences import check_cu_seqlens, sequence_slices
from . import chunked_delta

GATE_SHAPES = {1: "H", 3: "B T H", 4: "B T H K"}  # by number of dimensions


class SegmentState(NamedTuple):
    """The effect of a segment on a state S: it becomes ``decay * S + state``, or ``decay @ S + state``.

    Attributes:
        state: fp32 or wider [N,H,K,V].
        decay: of the same dtype, [N,H,K] or [N,H,1]; of the delta rule a matrix [N,H,K,K].
    """

    state: Tensor
    decay: Tensor


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
) -> SegmentState:
    """Compute the state after the given tokens, started from zeros, and their decay of an earlier state.

    It cannot be traced into one graph with cu_seqlens and gates that require gradients.

    Args:
        k: [B,T,H,K], any floating-point dtype; for BASED the features of the keys.
        v: [B,T,H,V]; with a column of ones appended, the state also holds the sum of keys, as a normaliser needs it.
        g: natural-log decay <= 0, [B,T,H,K], [B,T,H] or [H]; no decay by default. Differentiable, like k and v.
        beta: strength of writing of the delta rule, 0 to 2, [B,T,H]; None for linear attention.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of g, beta and cu_seqlens (synchronises). On a CPU they are always
            checked.

    Returns:
        The state [N,H,K,V] and the decay [N,H,K] ([N,H,1] unless gates are per channel), fp32 or wider. With beta the
        decay is a matrix [N,H,K,K].

    Raises:
        ValueError: a shape, dtype, device or gate is not as above.
    """
    sizes: dict[str, int] = {}
    check_shape(sizes, "k", k, "B T H K")
    check_shape(sizes, "v", v, "B T H V")
    if g is not None:
        if g.dim() not in GATE_SHAPES:
            raise ValueError(f"g: expected shape [H], [B, T, H] or [B, T, H, K], got {list(g.shape)}")
        check_shape(sizes, "g", g, GATE_SHAPES[g.dim()])
        check_log_decay(g, check_values)
    check_tensors("k", k=k, v=v, g=g)
    dtype = compute_dtype(k, v, g)
    k, v = k.to(dtype), v.to(dtype)
    if beta is not None:
        check_strength(sizes, k, beta, check_values)
        if cu_seqlens is not None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, sizes["B"], sizes["T"], check_values)
        return _delta_state(k, v, g, beta, cu_seqlens)
    if g is None:
        g = k.new_zeros(sizes["H"])
    g = (g if g.dim() == 4 else g.expand(sizes["B"], sizes["T"], sizes["H"])[..., None]).double()
    with no_autocast(k):
        if cu_seqlens is None:
            return _state(k, v, g)
        check_cu_seqlens("cu_seqlens", cu_seqlens, sizes["B"], sizes["T"], check_values)
        parts = [_state(k[:, s], v[:, s], g[:, s]) for s in sequence_slices(cu_seqlens)]
        if not parts:
            return _state(k[:0], v[:0], g[:0])
        return SegmentState(*map(torch.cat, zip(*parts, strict=True)))


def _state(k: Tensor, v: Tensor, g: Tensor) -> SegmentState:
    """Compute the state from k and v in its dtype and g [B,T,H,K] or [B,T,H,1] in fp64.

    Every exponent is a sum of gates, hence at most 0: nothing overflows.
    """
    later = torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), 1)[:, : g.shape[1]]
    to_end = later.flip(1).cumsum(1).flip(1).exp().to(k.dtype)
    return SegmentState(torch.einsum("bthk,bthv->bhkv", k * to_end, v), g.sum(1).exp().to(k.dtype))


def _delta_state(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor | None) -> SegmentState:
    """Run the delta rule on values [v | 0] from the state [0 | I]: its columns are the state and the transition."""
    if g is not None and g.dim() < 4:
        g = g.expand(*k.shape[:3])[..., None]
    sequences = len(k) if cu_seqlens is None else cu_seqlens.numel() - 1
    heads, dim = k.shape[2:]
    start = torch.eye(dim, dtype=k.dtype, device=k.device).expand(sequences, heads, dim, dim)
    with no_autocast(k):
        both = torch.cat((v, torch.zeros_like(k)), -1)
        start = torch.cat((start.new_zeros(sequences, heads, dim, v.shape[-1]), start), -1)
        _, after = chunked_delta.attend(k, k, both, g, beta, 1.0, start, cu_seqlens)
    return SegmentState(*after.split([v.shape[-1], dim], -1))


def check_strength(sizes: dict[str, int], first: Tensor, beta: Tensor, check_values: bool) -> None:
    """Check beta [B,T,H] of the delta rule, with values from 0 to 2."""
    check_shape(sizes, "beta", beta, "B T H")
    check_tensors("q", q=first, beta=beta)
    if reads_values(beta, check_values) and beta.numel():
        low, high = (float(x) for x in beta.detach().aminmax())
        if not (low >= 0 and high <= 2):
            raise ValueError(f"beta: expected numbers from 0 to 2 and no NaN, got {low:g} to {high:g}")


def merge_states(first: SegmentState, second: SegmentState) -> SegmentState:
    """Compute the state of the segment that consists of ``first`` followed by ``second``; associative.

    Raises:
        ValueError: the two have different shapes.
    """
    sizes: dict[str, int] = {}
    for name, part in (("first", first), ("second", second)):
        check_shape(sizes, f"{name}.state", part[0], "N H K V")
        if part[1].dim() == 4:
            check_shape({**sizes, "K'": sizes["K"]}, f"{name}.decay", part[1], "N H K K'")
            continue
        check_shape({**sizes, "G": part[1].shape[-1]}, f"{name}.decay", part[1], "N H G")
        if part[1].shape[-1] not in (1, sizes["K"]):
            raise ValueError(f"{name}.decay: expected 1 or {sizes['K']} per head, got {part[1].shape[-1]}")
    if first[1].dim() != second[1].dim():
        raise ValueError(f"second.decay: expected {first[1].dim()} dimensions as first.decay, got {second[1].dim()}")
    if first[1].dim() == 4:
        return SegmentState(second[1] @ first[0] + second[0], second[1] @ first[1])
    return SegmentState(second[1][..., None] * first[0] + second[0], first[1] * second[1])
