"""Which implementation serves a call."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .architectures import warn_of_torch

HAS_TRITON = find_spec("triton") is not None


def choose_backend(backend: str | None, q: Tensor | None = None, lacks: str | None = None) -> str:
    """Name of the backend that serves a call.

    Args:
        backend: the one asked for, which is never replaced; None is ``"triton"`` for CUDA tensors where the operator's
            kernels have the case, ``"torch"`` elsewhere, with a warning once per case if it is not for fp64.
        q: a tensor of the call, of an operator that has Triton kernels.
        lacks: why the Triton kernels cannot serve the call, as "argument: expected .., got .."; None if nothing does.

    Raises:
        ValueError: what was asked for by name is no backend of the operator, or lacks the case.
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
            raise ValueError(f"{lacks} with backend='triton'")
        if not q.is_cuda and not _interpreting():
            raise ValueError(f"q: expected a CUDA tensor with backend='triton' (or TRITON_INTERPRET=1), got {q.device}")
    return backend


def _interpreting() -> bool:
    """Whether Triton interprets kernels: what ``triton.knobs.runtime.interpret`` reads, and writes when it is set.

    Reads the environment variable, because torch.compile cannot trace the knob. torch.compiler's decorators for such
    functions would import torch._dynamo, which takes two seconds.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


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
