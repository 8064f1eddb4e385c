"""Training loss of JRT models: next-token prediction outside the prefix, masked-token prediction inside."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

MASKED = 0.15  # fraction of the prefix's tokens
MASKED_WEIGHT = 0.25  # weight of the masked tokens' loss


def prefix_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix_lengths: Tensor,
    *,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the training loss of JRT-RNN.

    Earlier tokens of the prefix attend to later ones, so that next-token prediction inside it would be trivial. Instead
    the mask token replaces 15 % of the prefix's tokens, and the model predicts them at their positions. This loss is
    added with a weight of 1/4.
    Arora et al., "Just read twice: closing the recall gap for recurrent language models" (2024), section 4.

    Args:
        model: a causal language model with ``prefix`` mixers.
        input_ids: [B,T], without padding.
        prefix_lengths: integers [B]; the paper uses half of T.
        mask_token_id: id of the mask token.
        generator: CPU random generator that selects the masked tokens.

    Returns:
        A scalar in fp32.

    Raises:
        ValueError: prefix_lengths has a wrong shape, or exceeds T.
    """
    batch, tokens = input_ids.shape
    if prefix_lengths.shape != (batch,) or bool(((prefix_lengths < 0) | (prefix_lengths > tokens)).any()):
        raise ValueError(f"prefix_lengths: expected {batch} numbers from 0 to {tokens}, got {prefix_lengths.tolist()}")
    inside = torch.arange(tokens, device=input_ids.device) < prefix_lengths[:, None]
    drawn = torch.rand(input_ids.shape, generator=generator, device=input_ids.device if generator is None else "cpu")
    masked = inside & (drawn.to(input_ids.device) < MASKED)
    logits = model(
        input_ids=input_ids.masked_fill(masked, mask_token_id), prefix_lengths=prefix_lengths, use_cache=False
    ).logits.float()
    wanted = ~inside[:, 1:]  # the last token of a prefix predicts the first token after it
    after = F.cross_entropy(logits[:, :-1][wanted], input_ids[:, 1:][wanted], reduction="sum")
    hidden = F.cross_entropy(logits[masked], input_ids[masked], reduction="sum")
    return after / wanted.sum().clamp(min=1) + MASKED_WEIGHT * hidden / masked.sum().clamp(min=1)
