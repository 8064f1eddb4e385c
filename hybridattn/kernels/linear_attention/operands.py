"""Checks and conversions of the linear-attention operators' operands."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.checks import check_log_decay, check_shape, check_tensors
from ..runtime.sequences import check_cu_seqlens
from .segment_state import GATE_SHAPES


class NormalizedState(NamedTuple):
    """State of a normalised operator.

    Attributes:
        kv: sum of k^T v, fp32 [N,H,K,V].
        k_sum: sum of k, fp32 [N,H,K].
    """

    kv: Tensor
    k_sum: Tensor


def check_operands(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, check_values: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape(sizes, "q", q, "B T Hq K")
    check_shape(sizes, "k", k, "B T H K")
    check_shape(sizes, "v", v, "B T Hv V")
    check_tensors("q", q=q, k=k, v=v)
    queries, keys, values = sizes["Hq"], sizes["H"], sizes["Hv"]
    if queries != keys and (keys == 0 or queries % keys or values != keys):
        raise ValueError(f"q: expected the {keys} heads of k, or a multiple of those of k and v, got {queries}")
    if values != keys and (keys == 0 or values % keys):
        raise ValueError(f"v: expected a multiple of the {keys} heads of k, got {values}")
    sizes["Hs"] = max(keys, values)
    sizes["N"] = sizes["B"]
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, sizes["B"], sizes["T"], check_values)
        sizes["N"] = cu_seqlens.numel() - 1
    return sizes


def check_gates(sizes: dict[str, int], q: Tensor, g: Tensor, check_values: bool) -> Tensor:
    """Check g and return it as [B,T,heads,K] or [B,T,heads,1]; heads are those of the keys or of the state."""
    if not isinstance(g, Tensor) or g.dim() not in GATE_SHAPES:
        given = list(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"g: expected shape [H], [B, T, H] or [B, T, H, K], got {given}")
    heads = g.shape[0] if g.dim() == 1 else g.shape[2]
    if heads == sizes["Hs"]:  # value heads that share a key head may each have their own gates
        check_shape({**sizes, "H": heads}, "g", g, GATE_SHAPES[g.dim()])
    else:
        check_shape(sizes, "g", g, GATE_SHAPES[g.dim()])
    check_tensors("q", q=q, g=g)
    check_log_decay(g, check_values)
    if g.dim() == 4:
        return g
    return g.expand(sizes["B"], sizes["T"], heads)[..., None]


def check_pair(name: str, state: Tensor | NormalizedState, sizes: dict[str, int]) -> NormalizedState:
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(
            f"{name}: expected a NormalizedState (kv, k_sum) with normalize=True, got {type(state).__name__}"
        )
    check_shape(sizes, f"{name}.kv", state[0], "N Hs K V")
    check_shape(sizes, f"{name}.k_sum", state[1], "N Hs K")
    return NormalizedState(*state)


def join_state(state: NormalizedState) -> Tensor:
    return torch.cat((state.kv, state.k_sum[..., None]), -1)


def taylor_scale(scale: float | None, sizes: dict[str, int]) -> float:
    positive = check_scale(scale, sizes)
    if positive <= 0:
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    return positive


def check_scale(scale: float | None, sizes: dict[str, int]) -> float:
    if scale is not None and not (isinstance(scale, int | float) and abs(scale) < float("inf")):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    return max(sizes["K"], 1) ** -0.5 if scale is None else scale


def match_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat the heads of x along ``dim`` until there are ``heads``; neighbours share a head of x."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def l2_normalize(x: Tensor) -> Tensor:
    """Divide the vectors x [..,K] by ``sqrt(sum of squares + 1e-6)``, as published code of the delta rule does."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
