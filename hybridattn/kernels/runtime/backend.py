"""Choice of an operator's backend (reference, torch or triton), and the dtypes it computes in."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .architectures import warn_of_torch

HAS_TRITON = find_spec("triton") is not None


def choose_backend(backend: str | None, q: Tensor | None = None, lacks: str | None = None) -> str:
    """Choose the backend of a call.

    Args:
        backend: the caller's choice, which is never replaced. None chooses ``"triton"`` for CUDA tensors if the
            operator's kernels support the call, else ``"torch"``. On a GPU the second choice warns once per case,
            except for fp64.
        q: a tensor of the call; None for an operator without Triton kernels.
        lacks: why the Triton kernels do not support the call, as "argument: expected .., got .."; None if they do.

    Returns:
        ``"reference"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: the operator has no backend of the given name, or that backend does not support the call.
    """
    if backend is None:
        if q is None or not q.is_cuda or not HAS_TRITON:
            return "torch"
        if lacks is not None and q.dtype != torch.float64 and not torch.compiler.is_compiling():
            warn_of_torch(lacks)
        return "triton" if lacks is None else "torch"
    names = ["reference", "torch"] if q is None else ["reference", "torch", "triton"]
    if backend not in names:
        raise ValueError(f"backend: expected one of {[*names, None]}, got {backend!r}")
    if backend == "triton" and q is not None:
        if lacks is not None:
            raise ValueError(f"{lacks} (with backend='triton')")
        if not q.is_cuda and not _interpreting():
            raise ValueError(f"q: expected a CUDA tensor with backend='triton' (or TRITON_INTERPRET=1), got {q.device}")
    return backend


def _interpreting() -> bool:
    """Return whether Triton interprets kernels.

    Reads the environment variable behind ``triton.knobs.runtime.interpret``: torch.compile cannot trace the knob.
    torch.compiler's decorators for untraceable functions would import torch._dynamo, which takes two seconds.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of sums and states: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast fp32 tensors to the 16-bit dtype of an active ``torch.autocast`` region, as for matrix operands."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def no_autocast(x: Tensor) -> torch.autocast:
    """Return a context that disables autocast, so that sums and states keep their dtype."""
    return torch.autocast(x.device.type, enabled=False)
