"""Correct bf16 arithmetic for Triton's interpreter, and a reversed order of its programs.

Under TRITON_INTERPRET=1 a kernel runs on NumPy, which has no bf16. The interpreter stores bf16 as 16-bit integers:
casts truncate, and sums, products and reductions act on the bit patterns. Inside ``exact_bf16`` the interpreter
converts operands to fp32 first and rounds a bf16 result to nearest even, as the hardware does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """Convert bf16, stored as uint16, to fp32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, stored as uint16, to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _wide_handle(x: Any) -> Any:
    return TensorHandle(widen(x.data), tl.float32) if _is_bf16(x) else x


def _computes_wide(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Wrap an operation: bf16 operands become fp32, and the result, unless boolean, becomes bf16 again."""

    def wide(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(map(_is_bf16, operands)):
            return operation(self, *operands)
        result = operation(self, *map(_wide_handle, operands))
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(narrow(result.data), tl.bfloat16)

    return wide


def _dot(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def dot(self: InterpreterBuilder, a: Any, b: Any, accumulator: TensorHandle, *options: Any) -> TensorHandle:
        return operation(self, _wide_handle(a), _wide_handle(b), accumulator, *options)

    return dot


def _cast(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast(self: InterpreterBuilder, x: TensorHandle, to: Any, *rounding: Any) -> TensorHandle:
        if tl.bfloat16 not in (x.dtype.scalar, to.scalar):
            return operation(self, x, to, *rounding)
        data = widen(x.data) if _is_bf16(x) else x.data.astype(np.float32)
        if to.scalar == tl.bfloat16:
            return TensorHandle(narrow(data), tl.bfloat16)
        return TensorHandle(data.astype(interpreter._get_np_dtype(to.scalar)), to.scalar)

    return cast


def _reduction(operation: Callable[..., tuple]) -> Callable[..., tuple]:
    def retype(x: Any, change: Callable[[np.ndarray], np.ndarray], dtype: Any) -> Any:
        kind = tl.block_type(dtype, x.shape) if x.type.is_block() else dtype
        return tl.core.tensor(TensorHandle(change(x.handle.data), dtype), kind)

    def reduce(self: ReduceScanOpInterface, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return reduce(self, (inputs,))[0]
        narrowed = [x.dtype == tl.bfloat16 for x in inputs]
        wide = tuple(retype(x, widen, tl.float32) if small else x for x, small in zip(inputs, narrowed, strict=True))
        results = operation(self, wide)
        return tuple(
            retype(x, narrow, tl.bfloat16) if small and x.dtype == tl.float32 else x
            for x, small in zip(results, narrowed, strict=False)
        )

    return reduce


@contextmanager
def exact_bf16() -> Iterator[None]:
    """Patch the interpreter inside the block; blocks may be nested."""
    wide = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf")
    repairs = {
        InterpreterBuilder: {
            **dict.fromkeys(wide, _computes_wide),
            "create_dot": _dot,
            "cast_impl": _cast,
            "create_fp_to_fp": _cast,
        },
        ReduceScanOpInterface: {"apply": _reduction},
    }
    with ExitStack() as stack:
        for owner, methods in repairs.items():
            for name, repair in methods.items():
                stack.enter_context(patch.object(owner, name, repair(getattr(owner, name))))
        yield


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every launch in reverse order; a race between programs then changes the result."""
    place = InterpreterBuilder.set_grid_idx

    def from_the_end(self: InterpreterBuilder, *indices: int) -> None:
        place(self, *(n - 1 - i for n, i in zip(self.grid_dim, indices, strict=True)))

    with patch.object(InterpreterBuilder, "set_grid_idx", from_the_end):
        yield
