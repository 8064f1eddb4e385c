"""Registration of functions as torch library ops, which torch.compile calls but does not trace."""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.library import custom_op, impl


def opaque_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function a ``torch.library.CustomOpDef`` for every device.

    The implementation that custom_op registers imports torch._dynamo at its first call, which takes seconds. Both it
    and this one use torch.compiler.disable to keep torch.compile from tracing the function. This one does so only once
    torch._dynamo has been imported.

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
