"""The one decoder: configuration, model, cache. A family is a set of defaults over it.

Names are looked up when used: transformers imports the configuration early, while its own modules are half loaded, and
the model must not be imported then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import HybridAttnConfig
    from .modeling import HybridAttnForCausalLM, HybridAttnForSequenceClassification, HybridAttnModel

__all__ = ["HybridAttnConfig", "HybridAttnForCausalLM", "HybridAttnForSequenceClassification", "HybridAttnModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "configuration" if name == "HybridAttnConfig" else "modeling"
    return getattr(import_module(f"{__name__}.{module}"), name)
