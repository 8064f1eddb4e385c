"""Argument checks of the public operators; every error reads ``argument: expected X, got Y``."""

import warnings
from functools import cache

import torch
from torch import Tensor

LIKELY_TOKENS = 32  # a second dimension shorter than a third one of at least this is likely the heads


def check_shape(sizes: dict[str, int], name: str, x: Tensor, pattern: str) -> None:
    """Check the shape of ``x`` against a pattern such as ``"B T H K"``.

    Args:
        sizes: size of every letter of earlier patterns, which ``x`` must match; new letters are added in place.
        name: name of the argument in the error.
        pattern: space-separated letters, one per dimension.

    Raises:
        ValueError: ``x`` is not a tensor of that shape.
    """
    letters = pattern.split()
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor [{', '.join(letters)}], got {type(x).__name__}")
    if x.dim() != len(letters) or any(sizes.get(c, n) != n for c, n in zip(letters, x.shape, strict=True)):
        expected = ", ".join(f"{c}={sizes[c]}" if c in sizes else c for c in letters)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(x.shape)}")
    sizes.update(zip(letters, x.shape, strict=True))


def check_tensors(first: str, **tensors: Tensor | None) -> None:
    """Check that all tensors (None is skipped) are floating point and on the device of the one named ``first``."""
    device = tensors[first].device  # pyright: ignore[reportOptionalMemberAccess]
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected device {device} (that of {first}), got {x.device}")


def check_flags(**flags: bool) -> None:
    """Check that options are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def reads_values(x: Tensor, check_values: bool) -> bool:
    """Return whether to check values: on a CPU always, on a GPU with ``check_values``, while tracing a graph never."""
    return (check_values or x.device.type == "cpu") and not torch.compiler.is_compiling()


def check_log_decay(g: Tensor, check_values: bool) -> None:
    """Check that log-decays are <= 0, if ``reads_values``; the check synchronises a GPU."""
    if reads_values(g, check_values) and g.numel() and not bool((top := g.detach().amax()) <= 0):
        raise ValueError(f"g: expected natural-log decays <= 0 and not NaN, got a maximum of {top.item():g}")


def check_inference(name: str, *tensors: Tensor | None) -> None:
    """Check that no input of an operator that updates its state in place requires a gradient."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            f"{name}: expected inputs without gradients (the state is updated in place), got requires_grad=True; "
            "use torch.no_grad() or the operator without _step"
        )


def check_layout(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Warn once of operands that look like [B,H,T,D]: batches with fewer tokens than heads, and many heads."""
    if cu_seqlens is not None or torch.compiler.is_compiling():
        return
    if all(x.shape[0] > 1 and 0 < x.shape[1] < x.shape[2] >= LIKELY_TOKENS for x in (q, k, v)):
        _warn_of_layout()


@cache
def _warn_of_layout() -> None:
    warnings.warn(
        "q, k, v: expected [batch, time, heads, dim], got fewer tokens than heads; "
        "if they are [batch, heads, time, dim], pass x.transpose(1, 2)",
        stacklevel=4,
    )
