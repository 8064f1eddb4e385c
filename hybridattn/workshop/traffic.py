"""Counts the bytes that a kernel launch loads and stores in Triton's interpreter; rejects out-of-bounds accesses.

    with count_traffic() as launches:
        gated_linear_attention_step(q, k, v, g, state, backend="triton")
    launches[0].loads["state"].total

All loads, stores and atomics of the interpreter, also by block pointer and tensor descriptor (TMA), go through four
methods, which this module patches. Masked lanes do not count. Before an access, its address is looked up among the
*elements* of the launch's tensors. So an address in a gap of a strided view is out of bounds.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridattn.kernels.runtime.architectures import Traffic


class OutOfBounds(IndexError):
    """An unmasked lane reads or writes an address outside all tensors of the launch."""


class Moved(NamedTuple):
    """Bytes loaded from or stored to one argument.

    Attributes:
        unique: bytes of distinct elements.
        total: bytes with repetitions.
    """

    unique: int
    total: int


@dataclass
class Launch:
    """Bytes that one launch loaded and stored, by argument; an element of several arguments counts for the first."""

    kernel: str
    loads: dict[str, Moved] = field(default_factory=dict)
    stores: dict[str, Moved] = field(default_factory=dict)

    @property
    def unique(self) -> int:
        return sum(moved.unique for moved in (*self.loads.values(), *self.stores.values()))

    @property
    def total(self) -> int:
        return sum(moved.total for moved in (*self.loads.values(), *self.stores.values()))


def over_target(launch: Launch, target: Traffic, arguments: dict[str, Tensor]) -> list[str]:
    """Return a message for every bound of ``target`` that a launch exceeded; ``arguments`` are tensors by name."""
    exceeded = []
    size = {name: x.numel() * x.element_size() for name, x in arguments.items()}
    needed = sum(size[name] for names in (target.loads, target.stores) for name in names)
    if launch.unique > target.unique * needed:
        exceeded.append(f"{launch.unique} distinct bytes are over {target.unique:g} times {needed}")
    for kind, moved, most in (("loads", launch.loads, target.loads), ("stores", launch.stores, target.stores)):
        for name, bytes_ in moved.items():
            if bytes_.total > most.get(name, 0.0) * size[name]:
                limit = f"{most.get(name, 0.0):g} times {size[name]}"
                exceeded.append(f"{kind} {bytes_.total} bytes of {name}, over {limit}")
    return exceeded


class _Elements:
    """The addresses of all elements of a launch's tensors, and the recorded accesses."""

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        self.kernel = kernel
        tensors = [(name, x) for name, value in arguments.items() for x in _tensors(value)]
        self.names = list(dict(tensors))
        kind = [("start", np.uint64), ("end", np.uint64), ("owner", int)]
        elements = [np.empty(0, kind)]
        for name, x in tensors:
            starts = _addresses(x)
            elements.append(np.empty(len(starts), kind))
            elements[-1]["start"], elements[-1]["end"] = starts, starts + np.uint64(x.element_size())
            elements[-1]["owner"] = self.names.index(name)
        joined = np.concatenate(elements)
        _, first = np.unique(joined["start"], return_index=True)  # an element of several tensors belongs to the first
        self.starts, self.ends, self.owners = (joined[name][first] for name in ("start", "end", "owner"))
        self.accesses: list[tuple[str, np.ndarray, int]] = []

    def record(self, kind: str, at: np.ndarray, width: int) -> None:
        """Record an access ("load" or "store") of ``width`` bytes at each address of ``at``.

        Raises:
            OutOfBounds: an address is outside the tensors.
        """
        places = np.searchsorted(self.starts, at, side="right") - 1
        inside = places >= 0
        inside[inside] = at[inside] + np.uint64(width) <= self.ends[places[inside]]
        if not inside.all():
            raise OutOfBounds(
                f"{self.kernel}: {(~inside).sum()} of {at.size} lanes {kind} outside {', '.join(self.names)}"
            )
        self.accesses.append((kind, places, width))

    def launch(self) -> Launch:
        result = Launch(self.kernel)
        for kind, moved in (("load", result.loads), ("store", result.stores)):
            noted = [(places, width) for each, places, width in self.accesses if each == kind]
            for n, name in enumerate(self.names):
                mine = [(places[self.owners[places] == n], width) for places, width in noted]
                total = sum(places.size * width for places, width in mine)
                if total:
                    elements = np.unique(np.concatenate([places for places, _ in mine]))
                    size = (self.ends[elements] - self.starts[elements]).sum()
                    moved[name] = Moved(int(size), int(total))
        return result


def _tensors(argument: Any) -> list[Tensor]:
    argument = argument.base if isinstance(argument, TensorDescriptor) else argument
    if isinstance(argument, tuple):
        return [x for part in argument for x in _tensors(part)]
    return [argument] if isinstance(argument, Tensor) else []


def _addresses(x: Tensor) -> np.ndarray:
    """Return the byte addresses of the elements of a CPU tensor."""
    if x.device.type != "cpu":
        raise ValueError(f"traffic: expected CPU tensors, got {x.device}")
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    return (np.unique(offsets) * x.element_size() + x.data_ptr()).astype(np.uint64)


@contextmanager
def count_traffic() -> Iterator[list[Launch]]:
    """Collect one ``Launch`` for every kernel launch in the block.

    Raises:
        OutOfBounds: wrapped in Triton's InterpreterError, from a launch with an out-of-bounds access.
    """
    launches: list[Launch] = []
    running: list[_Elements] = []

    def counted_launch(launch: Callable[..., None]) -> Callable[..., None]:
        def counted(self: GridExecutor, *arguments: Any, **named: Any) -> None:
            values = dict(zip(self.arg_names, arguments, strict=False)) | named
            tensors = {name: x for name, x in values.items() if name in self.arg_names}
            running.append(_Elements(self.fn.__name__, tensors))
            try:
                launch(self, *arguments, **named)
                launches.append(running[-1].launch())
            finally:
                running.pop()

        return counted

    def counted_access(access: Callable[..., Any], kinds: tuple[str, ...], at: int, mask_at: int | None) -> Any:
        """Wrap a method of the interpreter; ``at`` and ``mask_at`` are the indices of its pointers and its mask."""

        def counted(self: InterpreterBuilder, *arguments: Any, **named: Any) -> Any:
            pointers = arguments[at]
            mask = True if mask_at is None else _data(arguments[mask_at])
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            addresses, lanes = np.broadcast_arrays(pointers.data, np.asarray(mask, dtype=bool))
            for kind in kinds:
                running[-1].record(kind, addresses[lanes], width)
            return access(self, *arguments, **named)

        return counted

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", counted_launch(GridExecutor.__call__)))
        for name, kinds, at, mask_at in (
            ("create_masked_load", ("load",), 0, 1),
            ("create_masked_store", ("store",), 0, 2),
            ("create_atomic_rmw", ("load", "store"), 1, 3),
            ("create_atomic_cas", ("load", "store"), 0, None),
        ):
            counted = counted_access(getattr(InterpreterBuilder, name), kinds, at, mask_at)
            stack.enter_context(patch.object(InterpreterBuilder, name, counted))
        yield launches


def _data(mask: Any) -> np.ndarray:
    """Return a mask as an array; the interpreter passes handles, and for descriptors arrays."""
    return mask.data if hasattr(mask, "get_element_ty") else mask
