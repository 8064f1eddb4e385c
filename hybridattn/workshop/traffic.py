"""What a launch loads and stores, counted in Triton's interpreter, and accesses outside its tensors caught.

    with count_traffic() as launches:
        gated_linear_attention_step(q, k, v, g, state, backend="triton")
    launches[0].loads["state"].total

Every load, store and atomic goes through four methods of the interpreter, those by block pointers and by tensor
descriptors (TMA) too. Only lanes that are not masked count. An address is looked up among the *elements* of the
launch's tensors, so that a gap of a strided view is outside, and it is looked up before it is used.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridattn.kernels.runtime.launch import Traffic


class OutOfBounds(IndexError):
    """A lane that is not masked reads or writes outside every tensor of its launch."""


class Moved(NamedTuple):
    """Bytes of one argument that were loaded or stored: of distinct elements, and with repetitions."""

    unique: int
    total: int


@dataclass
class Launch:
    """One launch: bytes loaded and stored by argument name; of arguments that share memory, the first has them."""

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
    """What a launch moved beyond what its package declares; ``arguments`` are the kernel's tensors by name."""
    told = []
    size = {name: x.numel() * x.element_size() for name, x in arguments.items()}
    needed = sum(size[name] for names in (target.loads, target.stores) for name in names)
    if launch.unique > target.unique * needed:
        told.append(f"{launch.unique} distinct bytes are over {target.unique:g} times {needed}")
    for kind, moved, most in (("loads", launch.loads, target.loads), ("stores", launch.stores, target.stores)):
        for name, bytes_ in moved.items():
            if bytes_.total > most.get(name, 0.0) * size[name]:
                told.append(f"{kind} {bytes_.total} bytes of {name}, over {most.get(name, 0.0):g} times {size[name]}")
    return told


class _Elements:
    """Addresses of all elements of the tensors of a launch, and the accesses to them so far."""

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        self.kernel = kernel
        tensors = [(name, x) for name, value in arguments.items() for x in _tensors(value)]
        self.names = list(dict(tensors))
        addresses = [_addresses(x) for _, x in tensors]
        owners = [np.full(len(a), self.names.index(name)) for a, (name, _) in zip(addresses, tensors, strict=True)]
        sizes = [np.full(len(a), x.element_size()) for a, (_, x) in zip(addresses, tensors, strict=True)]
        joined = np.concatenate([np.empty(0, np.uint64), *addresses])
        self.starts, first = np.unique(joined, return_index=True)  # the first of several owners
        self.owners = np.concatenate([np.empty(0, int), *owners])[first]
        self.ends = self.starts + np.concatenate([np.empty(0, int), *sizes])[first].astype(np.uint64)
        self.accesses: list[tuple[str, np.ndarray, int]] = []

    def record(self, kind: str, addresses: np.ndarray, mask: np.ndarray, width: int) -> None:
        """Note an access of ``width`` bytes per lane.

        Raises:
            OutOfBounds: a lane that is not masked is outside the tensors.
        """
        at = np.broadcast_to(addresses, mask.shape)[mask]
        if not at.size:
            return
        places = np.searchsorted(self.starts, at, side="right") - 1
        inside = (places >= 0) & (len(self.ends) > 0)
        if len(self.ends):
            inside &= at + np.uint64(width) <= self.ends[places]
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
    """Byte addresses of the elements of a CPU tensor."""
    if x.device.type != "cpu":
        raise ValueError(f"traffic: expected CPU tensors, got {x.device}")
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    return (np.unique(offsets) * x.element_size() + x.data_ptr()).astype(np.uint64)


@contextmanager
def count_traffic() -> Iterator[list[Launch]]:
    """Collect one ``Launch`` for every kernel that the interpreter launches in the block.

    Raises:
        OutOfBounds: inside Triton's InterpreterError, from the launch that leaves its tensors.
    """
    launches: list[Launch] = []
    running: list[_Elements] = []
    call, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    atomic_rmw, atomic_cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def counted_call(self: GridExecutor, *arguments: Any, **named: Any) -> None:
        values = dict(zip(self.arg_names, arguments, strict=False)) | named
        running.append(_Elements(self.fn.__name__, {name: x for name, x in values.items() if name in self.arg_names}))
        try:
            call(self, *arguments, **named)
            launches.append(running[-1].launch())
        finally:
            running.pop()

    def note(kind: str, pointers: Any, mask: np.ndarray) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        running[-1].record(kind, pointers.data, np.asarray(mask, dtype=bool), width)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note("load", pointers, _data(mask))
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note("store", pointers, _data(mask))
        return store(self, pointers, value, mask, *rest, **named)

    def counted_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, _data(mask))
        note("store", pointers, _data(mask))
        return atomic_rmw(self, operation, pointers, value, mask, *rest)

    def counted_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = np.ones_like(pointers.data, dtype=bool)
        note("load", pointers, everywhere)
        note("store", pointers, everywhere)
        return atomic_cas(self, pointers, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", counted_call))
        for name, counted in (
            ("create_masked_load", counted_load),
            ("create_masked_store", counted_store),
            ("create_atomic_rmw", counted_rmw),
            ("create_atomic_cas", counted_cas),
        ):
            stack.enter_context(patch.object(InterpreterBuilder, name, counted))
        yield launches


def _data(mask: Any) -> np.ndarray:
    """The interpreter passes masks as its handles or, for descriptors, as arrays."""
    return mask.data if hasattr(mask, "get_element_ty") else mask
