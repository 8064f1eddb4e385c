"""Public names of the model families, each loaded at first use."""

from .based import HybridAttnBasedConfig as HybridAttnBasedConfig
from .based import HybridAttnJRTConfig as HybridAttnJRTConfig
from .delta import HybridAttnDeltaNetConfig as HybridAttnDeltaNetConfig
from .delta import HybridAttnGatedDeltaNetConfig as HybridAttnGatedDeltaNetConfig
from .delta import HybridAttnKDAConfig as HybridAttnKDAConfig
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
    HybridAttnDeltaNetForCausalLM as HybridAttnDeltaNetForCausalLM,
)
from .modeling import (
    HybridAttnDeltaNetForSequenceClassification as HybridAttnDeltaNetForSequenceClassification,
)
from .modeling import (
    HybridAttnDeltaNetModel as HybridAttnDeltaNetModel,
)
from .modeling import (
    HybridAttnGatedDeltaNetForCausalLM as HybridAttnGatedDeltaNetForCausalLM,
)
from .modeling import (
    HybridAttnGatedDeltaNetForSequenceClassification as HybridAttnGatedDeltaNetForSequenceClassification,
)
from .modeling import (
    HybridAttnGatedDeltaNetModel as HybridAttnGatedDeltaNetModel,
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
from .modeling import (
    HybridAttnKDAForCausalLM as HybridAttnKDAForCausalLM,
)
from .modeling import (
    HybridAttnKDAForSequenceClassification as HybridAttnKDAForSequenceClassification,
)
from .modeling import (
    HybridAttnKDAModel as HybridAttnKDAModel,
)
