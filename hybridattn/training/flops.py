"""Count the floating-point operations (FLOPs) of a model's matrix products and convolutions.

A multiply-add counts as two. Only operations that the result needs are counted: a causal query with the keys it may
attend to, and one update and one read of a linear state per token (2KV each). Norms, activations, gates, feature maps
and recomputation, by kernels or gradient checkpointing, are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hybridattn.layers import ShortConvolution, SoftmaxAttention
from hybridattn.layers.recurrent import RecurrentMixer


@dataclass(frozen=True)
class Flops:
    """Operations of one model as a function of the lengths of its input sequences.

    Attributes:
        forward_per_token: FLOPs per token of the parts whose cost is linear in the length, forward.
        training_per_token: the same, forward and backward.
        attention: for each softmax attention layer, FLOPs per query and key, and the window in tokens (None: all keys).
    """

    forward_per_token: int
    training_per_token: int
    attention: tuple[tuple[int, int | None], ...]

    def forward(self, lengths: Iterable[int]) -> int:
        """Return the FLOPs of a forward pass over sequences of these lengths, in tokens."""
        lengths = list(lengths)
        return self.forward_per_token * sum(lengths) + self._attention(lengths)

    def training(self, lengths: Iterable[int]) -> int:
        """Return the FLOPs of a forward and backward pass over sequences of these lengths, in tokens."""
        lengths = list(lengths)
        return self.training_per_token * sum(lengths) + 3 * self._attention(lengths)

    def _attention(self, lengths: list[int]) -> int:
        return sum(cost * sum(visible_keys(n, window) for n in lengths) for cost, window in self.attention)


def visible_keys(length: int, window: int | None) -> int:
    """Return the number of pairs of a query and a key that it attends to, in a causal sequence."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def count(model: nn.Module) -> Flops:
    """Count the operations of a decoder of this package, which may be on the meta device or have LoRA adapters.

    In training, the product with a frozen weight costs two forward products instead of three: it needs no weight
    gradient.

    Args:
        model: a ``HybridAttnForCausalLM``, also inside a wrapper.
    """
    forward = training = 0
    attention = []
    for name, module in model.named_modules():
        trained = True
        if isinstance(module, nn.Linear):
            if "_prefix_proj" in name:  # applies to prefix tokens only, and language modelling has none
                continue
            cost, trained = 2 * module.in_features * module.out_features, module.weight.requires_grad
        elif isinstance(module, ShortConvolution):
            cost, trained = 2 * module.kernel_size * module.hidden_size, module.weight.requires_grad
        elif isinstance(module, RecurrentMixer):
            cost = 2 * module.state_products * module.state_heads * module.state_dim * module.value_dim
        elif isinstance(module, SoftmaxAttention):
            attention.append((4 * module.num_heads * module.head_dim, module.window))
            continue
        else:
            continue
        forward += cost
        training += cost * (2 + trained)
    return Flops(forward, training, tuple(attention))
