"""GPU architectures, and the records that describe a kernel's launch rows.

A *launch row* (short: row) is one set of launch parameters of a kernel: block sizes, warps, pipeline stages. A row is
*verified* on an architecture once ``hybridattn kernels check`` has passed there with every case that uses the row.
Until then it is *compiled only*.
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
"""Architectures with rows in the launch tables: shared memory per program, in bytes."""


class CompileRow(NamedTuple):
    """One compilation of a kernel, as ``compile_cases.py`` declares it for ``hybridattn kernels compile``.

    Attributes:
        name: unique among the rows of an architecture; the part before the first space names the kernel.
        kernel: the ``triton.jit`` function.
        signature: type of every argument except constexprs, in the notation of Triton's AOT compiler: "*bf16",
            "i32", "fp32", "tensordesc<bf16[64,64]>". The suffix ":16" means that the address or number is divisible
            by 16, ":1" that the number is 1; the JIT would specialise on both. A tuple argument has a tuple of types.
        constexprs: value of every constexpr.
        num_warps, num_stages: launch options.
    """

    name: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class Traffic(NamedTuple):
    """Upper bounds of the memory traffic of one launch, which tests compare with the traffic in the interpreter.

    Attributes:
        unique: distinct bytes loaded and stored, divided by the bytes of all inputs and outputs together.
        loads, stores: by argument, the bytes loaded or stored (repetitions included) divided by the argument's bytes.
            The launch may not access an argument without an entry.
    """

    unique: float
    loads: dict[str, float]
    stores: dict[str, float]


def architecture(device: torch.device) -> str:
    """Return the name of a GPU's architecture, such as "sm_90" or "gfx942".

    A CPU, where Triton interprets the kernels, counts as "sm_90".
    """
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def nearest_architecture(name: str) -> str:
    """Return the architecture whose rows ``name`` uses: itself, or the nearest one with no more hardware features.

    sm_103 uses the rows of sm_100. Other NVIDIA GPUs (sm_86, sm_89, sm_120, ..) use those of sm_80, since they lack
    the matrix instructions of sm_90 and of sm_100. AMD GPUs use those of gfx942.
    """
    if name in SHARED_MEMORY:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    return "sm_100" if name == "sm_103" else "sm_80"


@cache
def read_verified(folder: Path) -> dict[str, dict[str, Any]]:
    """Read ``verified.json`` of a triton folder.

    Returns:
        {architecture: {row name: device and versions of the check}}; empty if there is no file.
    """
    file = folder / "verified.json"
    return json.loads(file.read_text()) if file.exists() else {}


@contextmanager
def launching(row: str, x: torch.Tensor) -> Iterator[None]:
    """Make the GPU of ``x`` current for launches of the row: Triton launches on the current GPU.

    Raises:
        RuntimeError: the row needs more of a resource than the GPU has, for instance shared memory.
    """
    from triton.runtime.errors import OutOfResources  # triton may be missing on a machine without a GPU

    try:
        with torch.cuda.device_of(x):
            yield
    except OutOfResources as error:
        raise RuntimeError(f"launch row {row!r} does not fit {architecture(x.device)}: {error}") from error


@cache
def warn_of_torch(lacks: str) -> None:
    """Warn, once per unsupported case, that the torch backend replaces the Triton kernels on a GPU."""
    warnings.warn(f"{lacks}: unsupported by the Triton kernels, using the torch backend", stacklevel=4)


@cache
def warn_of_launch(name: str, row: str, verified: bool) -> None:
    """Warn once if an architecture has no rows of its own, and once per row that is compiled only."""
    if (nearest := nearest_architecture(name)) != name:
        _warn_of_architecture(name, nearest)
    if not verified:
        warnings.warn(f"launch row {row!r} was compiled for {name} but not verified on that GPU", stacklevel=4)


@cache
def _warn_of_architecture(name: str, nearest: str) -> None:
    warnings.warn(f"no launch rows for {name}: using those of {nearest}", stacklevel=5)
