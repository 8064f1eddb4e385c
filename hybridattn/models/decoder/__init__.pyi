"""Public names of the decoder, each loaded at first use."""

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
