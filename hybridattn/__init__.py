"""Linear, softmax and hybrid attention: operators, layers and Hugging Face models.

Every public name is imported when it is first used: `import hybridattn` alone loads neither torch nor transformers, and
an operator needs torch only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from hybridattn.kernels.flash_attention import BlockMask, flash_attention, flash_decode
    from hybridattn.kernels.linear_attention import (
        gated_linear_attention,
        gated_linear_attention_step,
        linear_attention,
        linear_attention_state,
        linear_attention_step,
        merge_states,
        prefix_linear_attention,
        taylor_linear_attention,
        taylor_linear_attention_step,
    )
    from hybridattn.layers import (
        BaseConv,
        GatedLinearAttention,
        LightningAttention,
        LinearAttention,
        PrefixLinearAttention,
        Retention,
        ShortConvolution,
        SoftmaxAttention,
        TaylorLinearAttention,
        decay_slopes,
    )
    from hybridattn.layers.parallel import gather_sequence, sequence_parallel, shard_sequence
    from hybridattn.models.decoder import (
        HybridAttnConfig,
        HybridAttnForCausalLM,
        HybridAttnForSequenceClassification,
        HybridAttnModel,
    )
    from hybridattn.models.families import (
        HybridAttnBasedConfig,
        HybridAttnBasedForCausalLM,
        HybridAttnBasedForSequenceClassification,
        HybridAttnBasedModel,
        HybridAttnGLAConfig,
        HybridAttnGLAForCausalLM,
        HybridAttnGLAForSequenceClassification,
        HybridAttnGLAModel,
        HybridAttnJRTConfig,
        HybridAttnJRTForCausalLM,
        HybridAttnJRTForSequenceClassification,
        HybridAttnJRTModel,
    )

__version__ = "0.1.0"

_MODULES = {
    "linear_attention": "hybridattn.kernels.linear_attention",
    "linear_attention_step": "hybridattn.kernels.linear_attention",
    "linear_attention_state": "hybridattn.kernels.linear_attention",
    "merge_states": "hybridattn.kernels.linear_attention",
    "taylor_linear_attention": "hybridattn.kernels.linear_attention",
    "taylor_linear_attention_step": "hybridattn.kernels.linear_attention",
    "prefix_linear_attention": "hybridattn.kernels.linear_attention",
    "gated_linear_attention": "hybridattn.kernels.linear_attention",
    "gated_linear_attention_step": "hybridattn.kernels.linear_attention",
    "flash_attention": "hybridattn.kernels.flash_attention",
    "flash_decode": "hybridattn.kernels.flash_attention",
    "BlockMask": "hybridattn.kernels.flash_attention",
    "BaseConv": "hybridattn.layers",
    "GatedLinearAttention": "hybridattn.layers",
    "LightningAttention": "hybridattn.layers",
    "LinearAttention": "hybridattn.layers",
    "PrefixLinearAttention": "hybridattn.layers",
    "Retention": "hybridattn.layers",
    "ShortConvolution": "hybridattn.layers",
    "SoftmaxAttention": "hybridattn.layers",
    "TaylorLinearAttention": "hybridattn.layers",
    "decay_slopes": "hybridattn.layers",
    "gather_sequence": "hybridattn.layers.parallel",
    "sequence_parallel": "hybridattn.layers.parallel",
    "shard_sequence": "hybridattn.layers.parallel",
    "HybridAttnConfig": "hybridattn.models.decoder",
    "HybridAttnForCausalLM": "hybridattn.models.decoder",
    "HybridAttnForSequenceClassification": "hybridattn.models.decoder",
    "HybridAttnModel": "hybridattn.models.decoder",
    "HybridAttnGLAConfig": "hybridattn.models.families",
    "HybridAttnGLAForCausalLM": "hybridattn.models.families",
    "HybridAttnGLAForSequenceClassification": "hybridattn.models.families",
    "HybridAttnGLAModel": "hybridattn.models.families",
    "HybridAttnBasedConfig": "hybridattn.models.families",
    "HybridAttnBasedForCausalLM": "hybridattn.models.families",
    "HybridAttnBasedForSequenceClassification": "hybridattn.models.families",
    "HybridAttnBasedModel": "hybridattn.models.families",
    "HybridAttnJRTConfig": "hybridattn.models.families",
    "HybridAttnJRTForCausalLM": "hybridattn.models.families",
    "HybridAttnJRTForSequenceClassification": "hybridattn.models.families",
    "HybridAttnJRTModel": "hybridattn.models.families",
}

__all__ = [  # noqa: RUF022 (in the order of the table above)
    "linear_attention",
    "linear_attention_step",
    "linear_attention_state",
    "merge_states",
    "taylor_linear_attention",
    "taylor_linear_attention_step",
    "prefix_linear_attention",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "flash_attention",
    "flash_decode",
    "BlockMask",
    "BaseConv",
    "GatedLinearAttention",
    "LightningAttention",
    "LinearAttention",
    "PrefixLinearAttention",
    "Retention",
    "ShortConvolution",
    "SoftmaxAttention",
    "TaylorLinearAttention",
    "decay_slopes",
    "gather_sequence",
    "sequence_parallel",
    "shard_sequence",
    "HybridAttnConfig",
    "HybridAttnForCausalLM",
    "HybridAttnForSequenceClassification",
    "HybridAttnModel",
    "HybridAttnGLAConfig",
    "HybridAttnGLAForCausalLM",
    "HybridAttnGLAForSequenceClassification",
    "HybridAttnGLAModel",
    "HybridAttnBasedConfig",
    "HybridAttnBasedForCausalLM",
    "HybridAttnBasedForSequenceClassification",
    "HybridAttnBasedModel",
    "HybridAttnJRTConfig",
    "HybridAttnJRTForCausalLM",
    "HybridAttnJRTForSequenceClassification",
    "HybridAttnJRTModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_auto_classes(_module: Any) -> None:
    """Make AutoConfig know our models; their configuration brings in the model classes when it is instantiated.

    transformers has no plug-ins. Its configuration_auto is the one module that can be waited for: by the time
    modeling_auto is loaded, importing model code runs into transformers' own circular imports.
    """
    import_module("hybridattn.models.families.registration")


wrapt.when_imported("transformers.models.auto.configuration_auto")(_register_auto_classes)


def _register_attention(_module: Any) -> None:
    """Make ``attn_implementation="hybridattn"`` known, once the interface it is registered with is there."""
    import_module("hybridattn.models.attention")


wrapt.when_imported("transformers.modeling_utils")(_register_attention)
