"""Next-token loss computed from hidden states in chunks, which never holds the logits of all tokens."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...layers.parallel import SequenceParallel
from ...layers.parallel.exchange import Sum, next_labels

LOGITS_PER_CHUNK = 2**26  # elements, 256 MiB in fp32
HAS_LIGER = find_spec("liger_kernel") is not None


def next_token_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of next-token prediction with the logits ``hidden_states @ weight.T``.

    Args:
        hidden_states: [B,T,D]; autocast casts them to its dtype.
        weight: weight of the language-model head, [V,D].
        labels: int64 [B,T]. The target of a token is the label of the next one; -100 is ignored.
        num_items_in_batch: divisor of the summed loss; by default the number of targets.
        shift_labels: int64 [B,T], the target of each token, in place of ``labels``.

    Returns:
        The loss, a scalar in fp32.
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
    """Return the loss arguments that depend on other ranks: this rank's targets and the number of all targets."""
    if shift_labels is not None:
        context.check("shift_labels", shift_labels)
    targets = next_labels(labels) if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        num_items_in_batch = Sum.apply((targets != -100).sum(), context)
    return {"shift_labels": targets, "num_items_in_batch": num_items_in_batch}


def _summed(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies for ``x`` [N,D] and ``targets`` [N], by Liger, torch or chunks."""
    if HAS_LIGER and x.is_cuda:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(x, weight.to(x.dtype), targets, reduction="sum")
    fused = getattr(F, "linear_cross_entropy", None)  # torch >= 2.13
    # Only fp32: its loss has the dtype of x, and 16 bits are too few. It also causes a graph break in torch.compile.
    if fused is not None and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        options: Any = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
        return fused(x, weight, targets, reduction="sum", options=options)
    size = max(1, LOGITS_PER_CHUNK // len(weight))
    # The backward pass recomputes each chunk, so that memory holds the logits of one chunk at a time.
    parts = [
        checkpoint(_chunk, part, weight, wanted, use_reentrant=False)
        for part, wanted in zip(x.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(parts).sum()  # pyright: ignore[reportArgumentType]


def _chunk(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute one chunk. It casts the weight itself, so that gradients of chunks are summed in the weight's dtype."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, reduction="sum")
