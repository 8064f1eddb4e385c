"""Public names of the model families, each loaded at first use."""

from .based import HybridAttnBasedConfig as HybridAttnBasedConfig
from .based import HybridAttnJRTConfig as HybridAttnJRTConfig
from .gla import HybridAttnGLAConfig as HybridAttnGLAConfig
from .modeling import (
    HybridAttnBasedForCausalLM as HybridAttnBasedForCausalLM,
)
from .modeling import (
    HybridAttnBasedForSequenceClassification as HybridAttnBasedForSequenceClassification,
)
from .modeling import (
    HybridAttnBasedModel as HybridAttnBasedModel,
)
from .modeling import (
    HybridAttnGLAForCausalLM as HybridAttnGLAForCausalLM,
)
from .modeling import (
    HybridAttnGLAForSequenceClassification as HybridAttnGLAForSequenceClassification,
)
from .modeling import (
    HybridAttnGLAModel as HybridAttnGLAModel,
)
from .modeling import (
    HybridAttnJRTForCausalLM as HybridAttnJRTForCausalLM,
)
from .modeling import (
    HybridAttnJRTForSequenceClassification as HybridAttnJRTForSequenceClassification,
)
from .modeling import (
    HybridAttnJRTModel as HybridAttnJRTModel,
)
