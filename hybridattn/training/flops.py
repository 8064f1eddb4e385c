"""Floating-point operations of a model, exact by its matrix products and convolutions.

A multiply-add counts as two. Counted is what the result needs: a causal query meets the keys it may see, a linear
state is updated and read once per token (2KV each). Norms, activations, gates and feature maps are not counted, nor is
what a kernel or gradient checkpointing computes twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hybridattn.layers import ShortConvolution, SoftmaxAttention
from hybridattn.layers.recurrent import RecurrentMixer


@dataclass(frozen=True)
class Flops:
    """Operations of one model as a function of the lengths of the sequences it reads.

    Attributes:
        forward_per_token: of everything whose cost is linear in the length, forward.
        training_per_token: the same, forward and backward.
        attention: for each layer of softmax attention, operations per query and key, and the window (None: all keys).
    """

    forward_per_token: int
    training_per_token: int
    attention: tuple[tuple[int, int | None], ...]

    def forward(self, lengths: Iterable[int]) -> int:
        """Of one forward pass over sequences of these lengths, in tokens."""
        lengths = list(lengths)
        return self.forward_per_token * sum(lengths) + self._attention(lengths)

    def training(self, lengths: Iterable[int]) -> int:
        """Of one forward and backward pass over sequences of these lengths, in tokens."""
        lengths = list(lengths)
        return self.training_per_token * sum(lengths) + 3 * self._attention(lengths)

    def _attention(self, lengths: list[int]) -> int:
        return sum(cost * sum(visible_keys(n, window) for n in lengths) for cost, window in self.attention)


def visible_keys(length: int, window: int | None) -> int:
    """Sum over the queries of a causal sequence of the keys each one sees."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def count(model: nn.Module) -> Flops:
    """Count the operations of a decoder of this package, which may be on the meta device or carry LoRA adapters.

    A frozen weight needs no gradient: its product costs twice, not three times, the forward pass in training.

    Args:
        model: a ``HybridAttnForCausalLM``, bare or wrapped.
    """
    forward = training = 0
    attention = []
    for name, module in model.named_modules():
        trained = True
        if isinstance(module, nn.Linear):
            if "_prefix_proj" in name:  # only tokens of a prefix go through it, and language modelling has none
                continue
            cost, trained = 2 * module.in_features * module.out_features, module.weight.requires_grad
        elif isinstance(module, ShortConvolution):
            cost, trained = 2 * module.kernel_size * module.hidden_size, module.weight.requires_grad
        elif isinstance(module, RecurrentMixer):
            cost = 4 * module.num_heads * module.state_dim * module.value_dim
        elif isinstance(module, SoftmaxAttention):
            attention.append((4 * module.num_heads * module.head_dim, module.window))
            continue
        else:
            continue
        forward += cost
        training += cost * (2 + trained)
    return Flops(forward, training, tuple(attention))
