"""The state that a segment of a sequence contributes, and merging of such states (for segments, ranks, prefixes)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.backend import compute_dtype, no_autocast
from ..runtime.checks import check_log_decay, check_shape, check_tensors
from ..runtime.sequences import check_cu_seqlens, sequence_slices

GATE_SHAPES = {1: "H", 3: "B T H", 4: "B T H K"}  # by number of dimensions


class SegmentState(NamedTuple):
    """The effect of a segment on a state S: it becomes ``decay * S + state``.

    Attributes:
        state: fp32 or wider [N,H,K,V].
        decay: of the same dtype, [N,H,K] or [N,H,1].
    """

    state: Tensor
    decay: Tensor


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    check_values: bool = False,
) -> SegmentState:
    """Compute the state after the given tokens, started from zeros, and their decay of an earlier state.

    It cannot be traced into one graph with cu_seqlens and gates that require gradients.

    Args:
        k: [B,T,H,K], any floating-point dtype; for BASED the features of the keys.
        v: [B,T,H,V]; with a column of ones appended, the state also holds the sum of keys, as a normaliser needs it.
        g: natural-log decay <= 0, [B,T,H,K], [B,T,H] or [H]; no decay by default. Differentiable, like k and v.
        cu_seqlens: integer offsets [N+1] of sequences packed into one row (B = 1).
        check_values: on a GPU, also check the values of g and cu_seqlens (synchronises). On a CPU they are always
            checked.

    Returns:
        The state [N,H,K,V] and the decay [N,H,K] ([N,H,1] unless gates are per channel), fp32 or wider.

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


def merge_states(first: SegmentState, second: SegmentState) -> SegmentState:
    """Compute the state of the segment that consists of ``first`` followed by ``second``; associative.

    Raises:
        ValueError: the two have different shapes.
    """
    sizes: dict[str, int] = {}
    for name, part in (("first", first), ("second", second)):
        check_shape(sizes, f"{name}.state", part[0], "N H K V")
        check_shape({**sizes, "G": part[1].shape[-1]}, f"{name}.decay", part[1], "N H G")
        if part[1].shape[-1] not in (1, sizes["K"]):
            raise ValueError(f"{name}.decay: expected 1 or {sizes['K']} per head, got {part[1].shape[-1]}")
    return SegmentState(second[1][..., None] * first[0] + second[0], first[1] * second[1])
