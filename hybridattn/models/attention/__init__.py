"""``attn_implementation="hybridattn"``: softmax attention of any transformers model on this package's kernels.

transformers calls two functions by that name, registered together here: ``masks.create_mask`` once per forward pass and
kind of layer, ``forward.attention_forward`` in every layer, with the mask that the first made. An attention function
without a mask function is told nothing of padding.
"""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .forward import attention_forward
from .masks import create_mask

__all__ = ["attention_forward", "create_mask"]

AttentionInterface.register("hybridattn", attention_forward)
AttentionMaskInterface.register("hybridattn", create_mask)
