"""Registration of operators that torch.compile does not look into."""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op, impl


def opaque_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register the decorated function as ``torch.library.custom_op`` does, for every device.

    custom_op's own kernels import torch._dynamo when they are first called, which takes seconds. These leave it alone
    until something else has imported it; from then on torch.compile is kept from tracing them, as custom_op's are.

    Args:
        name: "namespace::operator".
        mutates_args: names of the arguments that the function updates in place.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
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
