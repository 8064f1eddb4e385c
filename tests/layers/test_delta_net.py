"""Delta-rule layers against their published formulas, computed token by token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridattn.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention, ShortConvolution

HEADS, DIM, TOKENS = 2, 12, 9


def causal_conv(conv: ShortConvolution, x: Tensor) -> Tensor:
    """Mix each channel of x [T,D] over its last tokens, then apply silu."""
    taps = conv.weight[:, 0]
    rows = [
        sum(taps[:, -1 - lag] * x[t - lag] for lag in range(min(t + 1, taps.shape[1])))  # type: ignore
        for t in range(len(x))
    ]
    return F.silu(torch.stack(rows))  # type: ignore


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def projections(layer: DeltaNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k [T,H,K] with norm 1, and v [T,H,V], for value heads."""
    q, k, v = (p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.q_conv is None:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    else:
        q, k, v = (
            causal_conv(c, y) for c, y in zip((layer.q_conv, layer.k_conv, layer.v_conv), (q, k, v), strict=True)
        )
    q, k = (unit(y.unflatten(-1, (layer.num_heads, -1))) for y in (q, k))
    group = layer.state_heads // layer.num_heads
    return q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v.unflatten(-1, (layer.state_heads, -1))


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Apply ``S_t = (I - beta_t k_t k_t^T) Diag(decay_t) S_{t-1} + beta_t k_t v_t^T`` and read with q / sqrt(K)."""
    rows = []
    for h in range(q.shape[1]):
        state = torch.zeros(q.shape[-1], v.shape[-1]).double()
        for t in range(len(q)):
            erase = torch.eye(q.shape[-1]).double() - beta[t, h] * torch.outer(k[t, h], k[t, h])
            state = erase @ (decay[t, h].expand(q.shape[-1])[:, None] * state)
            state = state + beta[t, h] * torch.outer(k[t, h], v[t, h])
            rows.append(q[t, h] @ state * q.shape[-1] ** -0.5)
    return torch.stack(rows).unflatten(0, (q.shape[1], len(q))).transpose(0, 1)


def normed(norm: nn.RMSNorm, o: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def test_delta_net_equals_the_published_formula():
    layer, x = DeltaNet(DIM, num_heads=HEADS, allow_neg_eigval=True).double(), torch.randn(1, TOKENS, DIM).double()
    q, k, v = projections(layer, x[0])
    beta = 2 * layer.b_proj(x[0]).sigmoid()
    o = recurrence(q, k, v, torch.ones_like(beta)[..., None], beta)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(normed(layer.g_norm, o).flatten(1)), rtol=1e-10, atol=1e-12)


def test_gated_delta_net_equals_the_published_formula():
    layer = GatedDeltaNet(DIM, num_heads=1, key_dim=4, num_value_heads=2, conv_size=None).double()
    x = torch.randn(1, TOKENS, DIM).double()
    q, k, v = projections(layer, x[0])
    assert (q.shape[1:], v.shape[1:]) == ((2, 4), (2, 8))
    gate = layer.gk_proj
    decay = torch.exp(-gate.A_log.exp() * F.softplus(gate.dt_proj(x[0]) + gate.dt_bias))
    o = normed(layer.g_norm, recurrence(q, k, v, decay[..., None], layer.b_proj(x[0]).sigmoid())).flatten(1)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(o * F.silu(layer.g_proj(x[0]))), rtol=1e-10, atol=1e-12)


def test_kimi_delta_attention_equals_the_published_formula():
    for lower_bound in (None, -5.0):
        layer = KimiDeltaAttention(DIM, num_heads=HEADS, key_dim=4, value_dim=3, lower_bound=lower_bound).double()
        x = torch.randn(1, TOKENS, DIM).double()
        gate = layer.gk_proj
        f = (gate.up(gate.down(x[0])) + gate.dt_bias).unflatten(-1, (HEADS, 4))
        rate = gate.A_log.exp()[:, None]
        log_decay = -rate * F.softplus(f) if lower_bound is None else lower_bound * torch.sigmoid(rate * f)
        o = recurrence(*projections(layer, x[0]), log_decay.exp(), layer.b_proj(x[0]).sigmoid())
        expected = layer.o_proj(normed(layer.g_norm, o).flatten(1) * torch.sigmoid(layer.g_proj(x[0])))
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-10, atol=1e-12)
