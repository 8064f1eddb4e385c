"""Registration of the configurations with AutoConfig, also of the model types shared with flash-linear-attention.

If a program imports flash-linear-attention, before or after this library, AutoModel opens checkpoints of these types
with flash-linear-attention's classes. The checkpoint format is the same for both libraries.
"""

import sys
import warnings
from typing import Any

import wrapt
from transformers import AutoConfig

from ..decoder.configuration import HybridAttnConfig
from .based import HybridAttnBasedConfig, HybridAttnJRTConfig
from .delta import HybridAttnDeltaNetConfig, HybridAttnGatedDeltaNetConfig, HybridAttnKDAConfig
from .gla import HybridAttnGLAConfig

FLA_MODULE = "fla.models"  # it imports the modules of all its model types, which have their names
SHARED = (HybridAttnGLAConfig, HybridAttnDeltaNetConfig, HybridAttnGatedDeltaNetConfig, HybridAttnKDAConfig)

for config in (HybridAttnConfig, HybridAttnBasedConfig, HybridAttnJRTConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)


def _warn_of_fla(_module: Any) -> None:
    types = ", ".join(repr(config.model_type) for config in SHARED)
    warnings.warn(
        f"flash-linear-attention is imported: AutoModel opens checkpoints of types {types} with the classes of "
        "flash-linear-attention; HybridAttnGLAForCausalLM.from_pretrained, and that of the other families, opens them "
        "with those of hybridattn",
        stacklevel=2,
    )


for config in SHARED:
    if f"{FLA_MODULE}.{config.model_type}" not in sys.modules:
        AutoConfig.register(config.model_type, config, exist_ok=True)
wrapt.when_imported(FLA_MODULE)(_warn_of_fla)  # at once if it is already imported
