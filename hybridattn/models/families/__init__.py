"""Published families: defaults over the one decoder, and the checkpoint format of flash-linear-attention's GLA.

Names are looked up when used, as in ``models.decoder``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .based import HybridAttnBasedConfig, HybridAttnJRTConfig
    from .gla import HybridAttnGLAConfig
    from .modeling import (
        HybridAttnBasedForCausalLM,
        HybridAttnBasedForSequenceClassification,
        HybridAttnBasedModel,
        HybridAttnGLAForCausalLM,
        HybridAttnGLAForSequenceClassification,
        HybridAttnGLAModel,
        HybridAttnJRTForCausalLM,
        HybridAttnJRTForSequenceClassification,
        HybridAttnJRTModel,
    )

_CONFIGURATIONS = {
    "HybridAttnGLAConfig": "gla",
    "HybridAttnBasedConfig": "based",
    "HybridAttnJRTConfig": "based",
}

__all__ = [
    "HybridAttnBasedConfig",
    "HybridAttnBasedForCausalLM",
    "HybridAttnBasedForSequenceClassification",
    "HybridAttnBasedModel",
    "HybridAttnGLAConfig",
    "HybridAttnGLAForCausalLM",
    "HybridAttnGLAForSequenceClassification",
    "HybridAttnGLAModel",
    "HybridAttnJRTConfig",
    "HybridAttnJRTForCausalLM",
    "HybridAttnJRTForSequenceClassification",
    "HybridAttnJRTModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CONFIGURATIONS.get(name, 'modeling')}"), name)
