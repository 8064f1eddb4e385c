"""The next-token loss from hidden states, without logits of all tokens at once."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...layers.parallel import SequenceParallel
from ...layers.parallel.exchange import Sum, next_labels

LOGITS_PER_CHUNK = 2**26  # elements: 256 MB in fp32
HAS_LIGER = find_spec("liger_kernel") is not None


def next_token_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each token's successor, logits being ``hidden_states @ weight.T``; a scalar in fp32.

    Args:
        hidden_states: [B,T,D]; under autocast the products are in its dtype.
        weight: of the head, [V,D].
        labels: int64 [B,T]; a token's target is the label after it, and -100 is no target.
        num_items_in_batch: what the sum is divided by; the number of targets if None.
        shift_labels: the targets themselves, [B,T], instead of what follows from the labels.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    targets = shift_labels.flatten()
    total = _summed(hidden_states.flatten(0, 1), weight, targets).float()
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def shared_targets(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
    shift_labels: Tensor | None,
    context: SequenceParallel,
) -> dict[str, Any]:
    """What a loss function needs to know of other ranks' tokens: this rank's targets, and how many there are in all."""
    if shift_labels is not None:
        context.check("shift_labels", shift_labels)
    targets = next_labels(labels) if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        num_items_in_batch = Sum.apply((targets != -100).sum(), context)
    return {"shift_labels": targets, "num_items_in_batch": num_items_in_batch}


def _summed(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of ``x`` [N,D] and ``targets`` [N]: by Liger, by torch, or in our own chunks."""
    if HAS_LIGER and x.is_cuda:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(x, weight.to(x.dtype), targets, reduction="sum")
    fused = getattr(F, "linear_cross_entropy", None)  # torch >= 2.13
    # It gives a loss in the dtype of x, too coarse in 16 bits, and breaks a graph being compiled.
    if fused is not None and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        options: Any = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
        return fused(x, weight, targets, reduction="sum", options=options)
    size = max(1, LOGITS_PER_CHUNK // len(weight))
    # Recomputed in the backward pass, so that one chunk's logits are alive at a time.
    parts = [
        checkpoint(_chunk, part, weight, wanted, use_reentrant=False)
        for part, wanted in zip(x.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(parts).sum()  # pyright: ignore[reportArgumentType]


def _chunk(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The weight is cast here, so that its gradient is summed over the chunks in its own dtype."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, reduction="sum")
