"""Model classes of the families, and the weight names of flash-linear-attention.

The classes are empty: they exist because transformers' Auto classes require a model class per configuration class.
"""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..decoder.modeling import HybridAttnForCausalLM, HybridAttnForSequenceClassification, HybridAttnModel
from .based import HybridAttnBasedConfig, HybridAttnJRTConfig
from .delta import HybridAttnDeltaNetConfig, HybridAttnGatedDeltaNetConfig, HybridAttnKDAConfig
from .gla import HybridAttnGLAConfig


class HybridAttnGLAModel(HybridAttnModel):
    """The decoder of a GLA model, without a head."""

    config_class = HybridAttnGLAConfig


class HybridAttnGLAForCausalLM(HybridAttnForCausalLM):
    """A GLA model with a language-model head."""

    config_class = HybridAttnGLAConfig


class HybridAttnGLAForSequenceClassification(HybridAttnForSequenceClassification):
    """A GLA model with a classifier."""

    config_class = HybridAttnGLAConfig


class HybridAttnDeltaNetModel(HybridAttnModel):
    """The decoder of a DeltaNet model, without a head."""

    config_class = HybridAttnDeltaNetConfig


class HybridAttnDeltaNetForCausalLM(HybridAttnForCausalLM):
    """A DeltaNet model with a language-model head."""

    config_class = HybridAttnDeltaNetConfig


class HybridAttnDeltaNetForSequenceClassification(HybridAttnForSequenceClassification):
    """A DeltaNet model with a classifier."""

    config_class = HybridAttnDeltaNetConfig


class HybridAttnGatedDeltaNetModel(HybridAttnModel):
    """The decoder of a Gated DeltaNet model, without a head."""

    config_class = HybridAttnGatedDeltaNetConfig


class HybridAttnGatedDeltaNetForCausalLM(HybridAttnForCausalLM):
    """A Gated DeltaNet model with a language-model head."""

    config_class = HybridAttnGatedDeltaNetConfig


class HybridAttnGatedDeltaNetForSequenceClassification(HybridAttnForSequenceClassification):
    """A Gated DeltaNet model with a classifier."""

    config_class = HybridAttnGatedDeltaNetConfig


class HybridAttnKDAModel(HybridAttnModel):
    """The decoder of a KDA model, without a head."""

    config_class = HybridAttnKDAConfig


class HybridAttnKDAForCausalLM(HybridAttnForCausalLM):
    """A KDA model with a language-model head."""

    config_class = HybridAttnKDAConfig


class HybridAttnKDAForSequenceClassification(HybridAttnForSequenceClassification):
    """A KDA model with a classifier."""

    config_class = HybridAttnKDAConfig


class HybridAttnBasedModel(HybridAttnModel):
    """The decoder of a BASED model, without a head."""

    config_class = HybridAttnBasedConfig


class HybridAttnBasedForCausalLM(HybridAttnForCausalLM):
    """A BASED model with a language-model head."""

    config_class = HybridAttnBasedConfig


class HybridAttnBasedForSequenceClassification(HybridAttnForSequenceClassification):
    """A BASED model with a classifier."""

    config_class = HybridAttnBasedConfig


class HybridAttnJRTModel(HybridAttnModel):
    """The decoder of a JRT model, without a head."""

    config_class = HybridAttnJRTConfig


class HybridAttnJRTForCausalLM(HybridAttnForCausalLM):
    """A JRT model with a language-model head."""

    config_class = HybridAttnJRTConfig


class HybridAttnJRTForSequenceClassification(HybridAttnForSequenceClassification):
    """A JRT model with a classifier."""

    config_class = HybridAttnJRTConfig


FLA_FAMILIES = (
    (HybridAttnGLAConfig, HybridAttnGLAModel, HybridAttnGLAForCausalLM, HybridAttnGLAForSequenceClassification),
    (
        HybridAttnDeltaNetConfig,
        HybridAttnDeltaNetModel,
        HybridAttnDeltaNetForCausalLM,
        HybridAttnDeltaNetForSequenceClassification,
    ),
    (
        HybridAttnGatedDeltaNetConfig,
        HybridAttnGatedDeltaNetModel,
        HybridAttnGatedDeltaNetForCausalLM,
        HybridAttnGatedDeltaNetForSequenceClassification,
    ),
    (HybridAttnKDAConfig, HybridAttnKDAModel, HybridAttnKDAForCausalLM, HybridAttnKDAForSequenceClassification),
)
FAMILIES = (
    *FLA_FAMILIES,
    (HybridAttnBasedConfig, HybridAttnBasedModel, HybridAttnBasedForCausalLM, HybridAttnBasedForSequenceClassification),
    (HybridAttnJRTConfig, HybridAttnJRTModel, HybridAttnJRTForCausalLM, HybridAttnJRTForSequenceClassification),
)
for config, model, causal, classifier in FAMILIES:
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)

# Weight names in flash-linear-attention's files -> this package's, applied in order. transformers inverts them to save.
# transformers applies them twice, for the base model and for its head's class, so that no name may match again.
# They are registered by class name, since flash-linear-attention's classes have the same model types.
FLA_NAMES = {
    "embeddings": "embed_tokens",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    r"\.attn\.": r"\.mixer\.",
    r"\.q_conv1d\.": r"\.q_conv\.",
    r"\.k_conv1d\.": r"\.k_conv\.",
    r"\.v_conv1d\.": r"\.v_conv\.",
}
GLA_NAMES = {
    **FLA_NAMES,
    r"\.g_norm_swish_gate\.": r"\.g_norm\.",
    r"\.gk_proj\.0\.": r"\.gk_proj\.down\.",
    r"\.gk_proj\.1\.": r"\.gk_proj\.up\.",
}
DELTA_NAMES = {
    **FLA_NAMES,
    r"\.o_norm\.": r"\.g_norm\.",
    r"\.a_proj\.": r"\.gk_proj\.dt_proj\.",
    r"\.mixer\.A_log": r"\.mixer\.gk_proj\.A_log",
    r"\.mixer\.dt_bias": r"\.mixer\.gk_proj\.dt_bias",
    r"\.f_proj\.0\.": r"\.gk_proj\.down\.",
    r"\.f_proj\.1\.": r"\.gk_proj\.up\.",
    r"\.g_proj\.0\.": r"\.g_proj\.down\.",
    r"\.g_proj\.1\.": r"\.g_proj\.up\.",
}
for config, *models in FLA_FAMILIES:
    names = GLA_NAMES if config is HybridAttnGLAConfig else DELTA_NAMES
    for model in models:
        renamings = (WeightRenaming(source_patterns=theirs, target_patterns=ours) for theirs, ours in names.items())
        register_checkpoint_conversion_mapping(model.__name__, [*renamings], overwrite=True)
