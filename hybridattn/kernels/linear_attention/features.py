"""Feature map of BASED: the second-order Taylor approximation of exp, in the feature order that all backends share.

For x of dimension d the P = 1 + d + d (d + 1) / 2 features phi(x) are

    1,    x_i  (i = 0 .. d-1),    x_i x_j * (1 if i < j else 1 / sqrt 2)  (i <= j, row by row)

so that phi(x) . phi(y) = 1 + x.y + (x.y)^2 / 2. The features are packed: the equal products (i, j) and (j, i) are one
feature. Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (BASED, 2024),
section 4.1, use all 1 + d + d^2 of them.
"""

import torch
from torch import Tensor


def count(dim: int) -> int:
    """Return P, the number of features of a vector of dimension ``dim``: 153 for 16."""
    return 1 + dim + dim * (dim + 1) // 2


def _weights(i: Tensor, j: Tensor, like: Tensor) -> Tensor:
    return like.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)


def taylor(x: Tensor) -> Tensor:
    """Compute the features [..,P] of x [..,d]."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    products = x[..., i] * x[..., j] * _weights(i, j, x)
    return torch.cat((torch.ones_like(x[..., :1]), x, products), -1)


def taylor_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient of x [..,d] from the gradient of its features [..,P]."""
    dim = x.shape[-1]
    i, j = torch.triu_indices(dim, dim, device=x.device)
    products = grad[..., 1 + dim :] * _weights(i, j, x)
    dx = grad[..., 1 : 1 + dim].clone()
    return dx.index_add_(-1, i, products * x[..., j]).index_add_(-1, j, products * x[..., i])
