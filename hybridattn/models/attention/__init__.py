"""Run the softmax attention of any transformers model on this package's kernels: ``attn_implementation="hybridattn"``.

Importing this package registers two functions under that name. transformers calls ``masks.create_mask`` once per
forward pass and kind of layer, and ``forward.attention_forward`` in every layer, with the mask that ``create_mask``
returned. Both are needed: without a mask function of its own, an attention function gets no information about padding.
"""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .forward import attention_forward
from .masks import create_mask

__all__ = ["attention_forward", "create_mask"]

AttentionInterface.register("hybridattn", attention_forward)
AttentionMaskInterface.register("hybridattn", create_mask)
