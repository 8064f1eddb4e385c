"""Makes AutoConfig know our configurations, and settles who opens model type ``gla``.

flash-linear-attention has models of that type too. Its own classes open them wherever it is imported, before or
after this library, since whoever imports it asks for them; checkpoints are the same either way.
"""

import sys
import warnings
from typing import Any

import wrapt
from transformers import AutoConfig

from ..decoder.configuration import HybridAttnConfig
from .based import HybridAttnBasedConfig, HybridAttnJRTConfig
from .gla import HybridAttnGLAConfig

THEIRS = "fla.models.gla"

for config in (HybridAttnConfig, HybridAttnBasedConfig, HybridAttnJRTConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)


def _leave_gla(_module: Any) -> None:
    warnings.warn(
        "flash-linear-attention is imported: AutoModel opens checkpoints of type 'gla' with its classes, "
        "HybridAttnGLAForCausalLM with those of hybridattn",
        stacklevel=2,
    )


if THEIRS not in sys.modules:
    AutoConfig.register(HybridAttnGLAConfig.model_type, HybridAttnGLAConfig, exist_ok=True)
wrapt.when_imported(THEIRS)(_leave_gla)  # at once where it is imported already
