"""What every table of launch parameters shares: architectures, and which rows were verified on them.

A row is what a kernel is launched with: block sizes, warps, stages. It is *verified* on an architecture once
``hybridattn kernels check`` passed there with every case that uses it, and *compiled only* before.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""The architectures that launch tables have rows for, with the bytes of shared memory that a program may have."""


class CompileRow(NamedTuple):
    """One compilation of a kernel, as its package declares it for ``hybridattn kernels compile``.

    Attributes:
        name: unique among the rows of its architecture; the part before the first space names the kernel.
        kernel: the ``triton.jit`` function.
        signature: Triton's type of every argument that is no constexpr, in the notation of its AOT compiler: "*bf16",
            "i32", "fp32", "tensordesc<bf16[64,64]>"; ":16" after it says that address or number are divisible by 16,
            ":1" that the number is 1. Both are what the JIT would specialise. A tuple of these for a tuple.
        constexprs: value of every constexpr.
        num_warps, num_stages: of the launch.
    """

    name: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class Traffic(NamedTuple):
    """Most bytes that one launch may move, as its package declares them; held by tests under the interpreter.

    Attributes:
        unique: distinct bytes loaded and stored, over the bytes of all inputs and outputs together.
        loads, stores: bytes loaded from or stored to each argument, repetitions included, over the argument's bytes.
            An argument that is not named may not be touched.
    """

    unique: float
    loads: dict[str, float]
    stores: dict[str, float]


def architecture(device: torch.device) -> str:
    """Name of a GPU's architecture, such as "sm_90" or "gfx942"; of a CPU, where kernels are interpreted, "sm_90"."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def nearest_architecture(name: str) -> str:
    """The architecture whose rows serve ``name``: itself, or the nearest that has no more than it.

    sm_103 is served as sm_100, other NVIDIA GPUs (sm_86, sm_89, sm_120, ..) as sm_80, since neither the matrix
    instructions of sm_90 nor those of sm_100 are theirs; AMD GPUs as gfx942.
    """
    if name in SHARED_MEMORY:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    return "sm_100" if name == "sm_103" else "sm_80"


@cache
def read_verified(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows verified so far, from ``verified.json`` in a package's triton folder: where by architecture and row name."""
    file = folder / "verified.json"
    return json.loads(file.read_text()) if file.exists() else {}


@contextmanager
def launching(row: str, x: torch.Tensor) -> Iterator[None]:
    """The region in which kernels of a launch row are started, on the GPU of ``x``: Triton takes the current one.

    Raises:
        RuntimeError: the row asks for more than this GPU has, of shared memory for instance.
    """
    from triton.runtime.errors import OutOfResources  # who has no GPU may have no triton

    try:
        with torch.cuda.device_of(x):
            yield
    except OutOfResources as error:
        raise RuntimeError(f"launch row {row!r} does not fit {architecture(x.device)}: {error}") from error


@cache
def warn_of_torch(lacks: str) -> None:
    """Say once of every case that its kernels lack that a GPU has the torch backend instead."""
    warnings.warn(f"{lacks} by the Triton kernels; the torch backend takes it", stacklevel=4)


@cache
def warn_of_launch(name: str, row: str, verified: bool) -> None:
    """Say once if a GPU has no rows of its own, and once per row that it was compiled only."""
    if (served := nearest_architecture(name)) != name:
        _warn_of_architecture(name, served)
    if not verified:
        warnings.warn(f"launch row {row!r} was compiled for {name} but not verified there", stacklevel=4)


@cache
def _warn_of_architecture(name: str, served: str) -> None:
    warnings.warn(f"no launch rows for {name}: taking those of {served}", stacklevel=5)
