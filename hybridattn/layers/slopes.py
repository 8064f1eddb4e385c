"""Constant slopes per head: the decays of RetNet and TransNormerLLM, and the biases of ALiBi."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .mixer import check_positive

CONVENTIONS = ("alibi", "retnet", "transnormer")


def decay_slopes(convention: str, num_heads: int, layer_idx: int = 0, num_layers: int = 1) -> list[float]:
    """Return the positive slopes of heads h = 1 .. H. A head's natural-log decay per token is ``-slope``.

    - ``"retnet"``: decay 1 - 2^(-4-h). Sun et al., "Retentive Network" (2023), section 2.2, equation 8.
    - ``"transnormer"``: decay exp(-(8h / H) (1 - l / L)) in layer l = 0 .. L-1 of L: later layers decay more slowly.
      Qin et al., "TransNormerLLM" (2023), section 3.1. The paper does not say where h and l start; with h from 1 and l
      from 0, every head decays. The published code of Lightning Attention instead scales ALiBi's slopes by the layer;
      pass such slopes as numbers.
    - ``"alibi"``: slope 2^(-8h / H) for any H. Press et al., "Train Short, Test Long" (ALiBi, 2022), section 3. Their
      code interpolates between powers of two.

    Args:
        convention: ``"retnet"``, ``"transnormer"`` or ``"alibi"``.
        num_heads: H.
        layer_idx: l, from 0. Only used by ``"transnormer"``.
        num_layers: L. Only used by ``"transnormer"``.

    Raises:
        ValueError: the convention is unknown, num_heads is not positive, or layer_idx is not below num_layers.
    """
    heads = range(1, check_positive("num_heads", num_heads) + 1)
    if not 0 <= layer_idx < check_positive("num_layers", num_layers):
        raise ValueError(f"layer_idx: expected 0 to {num_layers - 1}, one of {num_layers} layers, got {layer_idx!r}")
    if convention == "retnet":
        return [-math.log1p(-(2.0 ** (-4 - h))) for h in heads]
    if convention == "transnormer":
        return [8 * h / num_heads * (1 - layer_idx / num_layers) for h in heads]
    if convention == "alibi":
        return [2.0 ** (-8 * h / num_heads) for h in heads]
    raise ValueError(f"slopes: expected numbers or one of {list(CONVENTIONS)}, got {convention!r}")


class Slopes(nn.Module):
    """Constants [H] on the model's device, neither trained nor saved; they stay fp32 when the model is cast."""

    values: Tensor

    def __init__(self, numbers: Sequence[float], num_heads: int):
        super().__init__()
        if len(numbers) != num_heads or not all(0 <= x < math.inf for x in numbers):
            raise ValueError(f"slopes: expected {num_heads} numbers of at least 0, one per head, got {numbers!r}")
        self.numbers = [float(x) for x in numbers]
        self.register_buffer("values", torch.tensor(self.numbers, dtype=torch.float32), persistent=False)

    def fresh(self) -> Tensor:
        """Return the values again: a buffer that was created on the meta device has lost them."""
        return torch.tensor(self.numbers, dtype=torch.float32, device=self.values.device)

    def _apply(self, fn, recurse: bool = True) -> "Slopes":
        super()._apply(fn, recurse)  # a cast would round the slopes; decays near 1 need fp32
        self.values = self.fresh()
        return self

    def forward(self) -> Tensor:
        return self.values
