"""Registration of the configurations with AutoConfig, and of model type ``gla``, shared with flash-linear-attention.

If a program imports flash-linear-attention, before or after this library, AutoModel opens checkpoints of type ``gla``
with flash-linear-attention's classes. The checkpoint format is the same for both libraries.
"""

import sys
import warnings
from typing import Any

import wrapt
from transformers import AutoConfig

from ..decoder.configuration import HybridAttnConfig
from .based import HybridAttnBasedConfig, HybridAttnJRTConfig
from .gla import HybridAttnGLAConfig

FLA_MODULE = "fla.models.gla"

for config in (HybridAttnConfig, HybridAttnBasedConfig, HybridAttnJRTConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)


def _warn_of_fla(_module: Any) -> None:
    warnings.warn(
        "flash-linear-attention is imported: AutoModel opens checkpoints of type 'gla' with the classes of "
        "flash-linear-attention; HybridAttnGLAForCausalLM.from_pretrained opens them with those of hybridattn",
        stacklevel=2,
    )


if FLA_MODULE not in sys.modules:
    AutoConfig.register(HybridAttnGLAConfig.model_type, HybridAttnGLAConfig, exist_ok=True)
wrapt.when_imported(FLA_MODULE)(_warn_of_fla)  # at once if it is already imported
