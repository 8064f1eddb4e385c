"""The decoder's public names, each loaded when it is first used."""

from .configuration import HybridAttnConfig as HybridAttnConfig
from .modeling import (
    HybridAttnForCausalLM as HybridAttnForCausalLM,
)
from .modeling import (
    HybridAttnForSequenceClassification as HybridAttnForSequenceClassification,
)
from .modeling import (
    HybridAttnModel as HybridAttnModel,
)
