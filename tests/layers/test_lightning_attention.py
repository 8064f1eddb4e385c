"""Lightning attention against its published formula, and against the layer of transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

from hybridattn.layers import LightningAttention


@pytest.mark.parametrize("activate_values", [True, False])
def test_lightning_attention_equals_the_published_formula(activate_values: bool):
    heads, dim, tokens = 3, 12, 7
    layer = LightningAttention(dim, heads, layer_idx=1, num_layers=4, activate_values=activate_values).double()
    x = torch.randn(1, tokens, dim).double()

    def silu(y: Tensor) -> Tensor:
        return y / (1 + torch.exp(-y))

    q, k, v = ((x[0] @ p.weight.T).unflatten(-1, (heads, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = silu(q), silu(k), silu(v) if activate_values else v
    rows = []
    for n in range(tokens):
        row = torch.zeros(heads, 4).double()
        for h in range(heads):
            decay = torch.exp(torch.tensor(-(8 * (h + 1) / heads) * (1 - 1 / 4)).double())
            for m in range(n + 1):
                row[h] += decay ** (n - m) * (q[n, h] @ k[m, h]) * 4**-0.5 * v[m, h]
        rows.append(row.flatten() / (row.square().mean() + 1e-6).sqrt())
    gate = torch.sigmoid(x[0] @ layer.g_proj.weight.T)
    expected = (torch.stack(rows) * gate) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-7)  # slopes are fp32


@torch.no_grad()
def test_lightning_attention_equals_minimax_of_transformers():
    """With the slopes of transformers as numbers. Its norm has weights, initially one, and no scale before it."""
    config = MiniMaxConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=4, block_size=4, head_dim=8, hidden_act="silu"
    )
    theirs = MiniMaxLightningAttention(config, layer_idx=1)
    ours = LightningAttention(16, num_heads=2, slopes=theirs.slope_rate.flatten().tolist(), norm_eps=1e-6 / 8)
    weight = theirs.qkv_proj.weight.unflatten(0, (2, 3, 8))
    for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
        projection.weight.copy_(weight[:, i].flatten(0, 1))
    ours.g_proj.load_state_dict(theirs.output_gate.state_dict())
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 11, 16)
    expected, *_ = theirs(x, position_embeddings=None, attention_mask=None)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-6)
