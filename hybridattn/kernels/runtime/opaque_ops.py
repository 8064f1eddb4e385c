"""Registration of operators that torch.compile does not trace."""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.library import custom_op, impl


def opaque_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a ``torch.library.CustomOpDef`` of the decorated function, for every device.

    What custom_op registers imports torch._dynamo when it is first called, which takes seconds. This kernel calls
    torch.compiler.disable, which keeps torch.compile from tracing the function as custom_op does, only if torch._dynamo
    has already been imported.

    Args:
        name: "namespace::operator".
        mutates_args: names of the arguments that the function updates in place.
    """

    def register(function: Callable[..., Any]) -> Any:
        @cache
        def untraced() -> Callable[..., Any]:
            return torch.compiler.disable(function)

        def kernel(*arguments: Any, **options: Any) -> Any:
            call = untraced() if "torch._dynamo" in sys.modules else function
            return call(*arguments, **options)

        op = custom_op(name, function, mutates_args=mutates_args, device_types=())
        impl(name, "default", kernel)
        return op

    return register
