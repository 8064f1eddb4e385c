"""Muon in a type of one's choice: `torch.optim.Muon` computes in bf16, which a CPU without such instructions emulates.

There the optimiser takes four fifths of a step of a small model (measured on an AMD EPYC with AVX2).
Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import math
from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: five steps bring values above 0.002 to 0.68 to 1.2
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values, unless tiny, are brought near 1, for matrices ``[rows, columns]``.

    Args:
        params: matrices.
        lr: learning rate; a matrix with more rows than columns takes sqrt(rows / columns) times as much.
        weight_decay: share of a weight that a step takes off, relative to ``lr``.
        momentum: share of the mean of gradients that a step keeps (Nesterov's).
        dtype: in which singular values are brought near 1.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "dtype": dtype})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"params: expected matrices, got one of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; matrices without a gradient stay.

        Raises:
            ValueError: a closure, which is not supported.
        """
        if closure is not None:
            raise ValueError("closure: expected None, this optimiser calls none")
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "mean" not in self.state[weight]:
                    self.state[weight]["mean"] = torch.zeros_like(weight.grad)
                mean = self.state[weight]["mean"]
                mean.lerp_(weight.grad, 1 - momentum)
                update = orthogonal(weight.grad.lerp(mean, momentum).to(group["dtype"]))
                rows, columns = weight.shape
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of ``[rows, columns]`` near 1, by a Newton-Schulz iteration of fifth order."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
