"""Which implementation serves a call."""

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_backend(backend: str | None, available: Sequence[str] = ("reference", "torch")) -> str:
    """Name of the backend that serves a call: the one asked for, or ``"torch"`` for None.

    Raises:
        ValueError: the name is not one of ``available``; what was asked for by name is never replaced.
    """
    if backend is None:
        return "torch"
    if backend not in available:
        raise ValueError(f"backend: expected one of {[*available, None]}, got {backend!r}")
    return backend


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums and states: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as an active ``torch.autocast`` region wants matrix operands: fp32 becomes its 16-bit dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """A region in which sums and states keep their own dtype, whatever autocast the caller is in."""
    return torch.autocast(x.device.type, enabled=False)
