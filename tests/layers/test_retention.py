"""Retention against the formulas of Sun et al."""

import torch
from torch import Tensor

from hybridattn.layers import Retention


def test_retention_equals_the_published_formula():
    """Equations 5 and 8, computed for each pair of tokens, with complex numbers for the rotation."""
    heads, dim, tokens = 2, 12, 7
    layer, x = Retention(dim, num_heads=heads).double(), torch.randn(1, tokens, dim).double()

    def project(p: torch.nn.Linear) -> Tensor:
        return (x[0] @ p.weight.T).unflatten(-1, (heads, -1))

    q, k, v = (project(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert v.shape[-1] == 2 * q.shape[-1] == dim
    theta = 10000.0 ** (-torch.arange(3).double() / 3)
    rows = []
    for n in range(tokens):
        row = []
        for h in range(heads):
            gamma, total = 1 - 2.0 ** (-5 - h), torch.zeros(dim).double()
            for m in range(n + 1):
                turned = torch.complex(q[n, h, :3], q[n, h, 3:]) * torch.exp(1j * n * theta)
                other = torch.complex(k[m, h, :3], k[m, h, 3:]) * torch.exp(1j * m * theta)
                total = total + gamma ** (n - m) * (turned * other.conj()).sum().real * 6**-0.5 * v[m, h]
            centred = total - total.mean()
            row.append(centred / (centred.square().mean() + 1e-5).sqrt())
        rows.append(torch.cat(row))
    swish = x[0] @ layer.g_proj.weight.T
    expected = (torch.stack(rows) * swish * torch.sigmoid(swish)) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)  # the rotation's angles are fp32
