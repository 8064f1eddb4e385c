"""The public names, each loaded from its module when it is first used."""

from .kernels.flash_attention import (
    BlockMask as BlockMask,
)
from .kernels.flash_attention import (
    flash_attention as flash_attention,
)
from .kernels.flash_attention import (
    flash_decode as flash_decode,
)
from .kernels.linear_attention import (
    NormalizedState as NormalizedState,
)
from .kernels.linear_attention import (
    SegmentState as SegmentState,
)
from .kernels.linear_attention import (
    gated_delta_rule as gated_delta_rule,
)
from .kernels.linear_attention import (
    gated_delta_rule_step as gated_delta_rule_step,
)
from .kernels.linear_attention import (
    gated_linear_attention as gated_linear_attention,
)
from .kernels.linear_attention import (
    gated_linear_attention_step as gated_linear_attention_step,
)
from .kernels.linear_attention import (
    linear_attention as linear_attention,
)
from .kernels.linear_attention import (
    linear_attention_state as linear_attention_state,
)
from .kernels.linear_attention import (
    linear_attention_step as linear_attention_step,
)
from .kernels.linear_attention import (
    merge_states as merge_states,
)
from .kernels.linear_attention import (
    prefix_linear_attention as prefix_linear_attention,
)
from .kernels.linear_attention import (
    taylor_linear_attention as taylor_linear_attention,
)
from .kernels.linear_attention import (
    taylor_linear_attention_step as taylor_linear_attention_step,
)
from .layers import (
    BaseConv as BaseConv,
)
from .layers import (
    Cache as Cache,
)
from .layers import (
    DeltaNet as DeltaNet,
)
from .layers import (
    GatedDeltaNet as GatedDeltaNet,
)
from .layers import (
    GatedLinearAttention as GatedLinearAttention,
)
from .layers import (
    KimiDeltaAttention as KimiDeltaAttention,
)
from .layers import (
    LightningAttention as LightningAttention,
)
from .layers import (
    LinearAttention as LinearAttention,
)
from .layers import (
    Mamba2 as Mamba2,
)
from .layers import (
    PrefixLinearAttention as PrefixLinearAttention,
)
from .layers import (
    Retention as Retention,
)
from .layers import (
    ShortConvolution as ShortConvolution,
)
from .layers import (
    SoftmaxAttention as SoftmaxAttention,
)
from .layers import (
    TaylorLinearAttention as TaylorLinearAttention,
)
from .layers import (
    TokenMixer as TokenMixer,
)
from .layers import (
    decay_slopes as decay_slopes,
)
from .layers.parallel import (
    gather_sequence as gather_sequence,
)
from .layers.parallel import (
    sequence_parallel as sequence_parallel,
)
from .layers.parallel import (
    shard_sequence as shard_sequence,
)
from .models.decoder import (
    HybridAttnConfig as HybridAttnConfig,
)
from .models.decoder import (
    HybridAttnForCausalLM as HybridAttnForCausalLM,
)
from .models.decoder import (
    HybridAttnForSequenceClassification as HybridAttnForSequenceClassification,
)
from .models.decoder import (
    HybridAttnModel as HybridAttnModel,
)
from .models.families import (
    HybridAttnBasedConfig as HybridAttnBasedConfig,
)
from .models.families import (
    HybridAttnBasedForCausalLM as HybridAttnBasedForCausalLM,
)
from .models.families import (
    HybridAttnBasedForSequenceClassification as HybridAttnBasedForSequenceClassification,
)
from .models.families import (
    HybridAttnBasedModel as HybridAttnBasedModel,
)
from .models.families import (
    HybridAttnDeltaNetConfig as HybridAttnDeltaNetConfig,
)
from .models.families import (
    HybridAttnDeltaNetForCausalLM as HybridAttnDeltaNetForCausalLM,
)
from .models.families import (
    HybridAttnDeltaNetForSequenceClassification as HybridAttnDeltaNetForSequenceClassification,
)
from .models.families import (
    HybridAttnDeltaNetModel as HybridAttnDeltaNetModel,
)
from .models.families import (
    HybridAttnGatedDeltaNetConfig as HybridAttnGatedDeltaNetConfig,
)
from .models.families import (
    HybridAttnGatedDeltaNetForCausalLM as HybridAttnGatedDeltaNetForCausalLM,
)
from .models.families import (
    HybridAttnGatedDeltaNetForSequenceClassification as HybridAttnGatedDeltaNetForSequenceClassification,
)
from .models.families import (
    HybridAttnGatedDeltaNetModel as HybridAttnGatedDeltaNetModel,
)
from .models.families import (
    HybridAttnGLAConfig as HybridAttnGLAConfig,
)
from .models.families import (
    HybridAttnGLAForCausalLM as HybridAttnGLAForCausalLM,
)
from .models.families import (
    HybridAttnGLAForSequenceClassification as HybridAttnGLAForSequenceClassification,
)
from .models.families import (
    HybridAttnGLAModel as HybridAttnGLAModel,
)
from .models.families import (
    HybridAttnJRTConfig as HybridAttnJRTConfig,
)
from .models.families import (
    HybridAttnJRTForCausalLM as HybridAttnJRTForCausalLM,
)
from .models.families import (
    HybridAttnJRTForSequenceClassification as HybridAttnJRTForSequenceClassification,
)
from .models.families import (
    HybridAttnJRTModel as HybridAttnJRTModel,
)
from .models.families import (
    HybridAttnKDAConfig as HybridAttnKDAConfig,
)
from .models.families import (
    HybridAttnKDAForCausalLM as HybridAttnKDAForCausalLM,
)
from .models.families import (
    HybridAttnKDAForSequenceClassification as HybridAttnKDAForSequenceClassification,
)
from .models.families import (
    HybridAttnKDAModel as HybridAttnKDAModel,
)
from .models.presets import PRESETS as PRESETS

__version__: str
