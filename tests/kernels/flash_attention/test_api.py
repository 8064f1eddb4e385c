"""Plain softmax attention and bad input. The laws are in ../test_laws.py, options and decode beside this file."""

import pytest
import torch

from hybridattn.kernels.flash_attention import flash_attention

B, T, H, D = 2, 9, 2, 8


def inputs(queries: int = T, keys: int = T, query_heads: int = H) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, t, h, D).double() for t, h in ((queries, query_heads), (keys, H), (keys, H)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_plain_softmax_attention(backend: str):
    q, k, v = inputs()
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * 0.3).masked_fill(~torch.ones(T, T).bool().tril(), -torch.inf)
    expected = torch.einsum("bhts,bshd->bthd", weights.softmax(-1), v)
    torch.testing.assert_close(flash_attention(q, k, v, scale=0.3, backend=backend), expected)


@pytest.mark.parametrize("keys", [1, 5, 9, 30])
def test_not_causal_sees_all_keys(keys: int):
    q, k, v = inputs(keys=keys)
    expected = torch.einsum("bhts,bshd->bthd", (torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5).softmax(-1), v)
    for backend in ("reference", "torch"):
        torch.testing.assert_close(flash_attention(q, k, v, causal=False, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 3])
def test_queries_before_the_first_key_get_zeros(backend: str, window: int | None):
    q, k, v = inputs(queries=9, keys=6)
    o = flash_attention(q, k, v, window=window, backend=backend)
    assert not o[:, :3].any()
    torch.testing.assert_close(o[:, 3:], flash_attention(q[:, 3:], k, v, window=window, backend="reference"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_queries_without_any_keys_get_zeros(backend: str, causal: bool):
    """No keys at all, a packed sequence without keys, and tokens past the last offset; with gradients of zero."""
    q, k, v = (x.requires_grad_() for x in inputs())
    alone = flash_attention(q, k[:, :0], v[:, :0], causal=causal, backend=backend)
    packed = flash_attention(
        *(x[:1] for x in (q, k, v)),
        causal=causal,
        cu_seqlens_q=torch.tensor([0, 3, 7]),
        cu_seqlens_k=torch.tensor([0, 0, 4]),
        backend=backend,
    )
    assert not alone.any()
    assert not packed[:, :3].any()
    assert not packed[:, 7:].any()
    unseen = alone.sum() + packed[:, :3].sum() + packed[:, 7:].sum()
    grads = torch.autograd.grad(unseen, (q, k, v), allow_unused=True, materialize_grads=True)
    assert not any(dx.any() for dx in grads)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_of_dim_zero_weight_all_keys_equally(causal: bool):
    _, _, v = inputs()
    q = v[..., :0]
    o = flash_attention(q, q, v, causal=causal)
    torch.testing.assert_close(o, flash_attention(q, q, v, causal=causal, backend="reference"))


BAD = {
    "window zero": ({"window": 0}, "window: expected a positive integer, a pair .* got 0"),
    "window float": ({"window": 2.5}, "window: expected a positive integer, a pair .* got 2.5"),
    "window, not causal": (
        {"window": 2, "causal": False},
        r"window: expected a pair \(left, right\) or None without causal=True",
    ),
    "backend": (
        {"backend": "cuda"},
        r"backend: expected one of \['reference', 'torch', 'triton', None\], got 'cuda'",
    ),
    "backend on a CPU": ({"backend": "triton"}, r"q: expected float32, float16 or bfloat16, got torch.float64 \("),
    "offsets of keys alone": ({"cu_seqlens_k": torch.tensor([0, 9])}, "cu_seqlens_q: expected offsets with"),
    "packed batch": ({"cu_seqlens_q": torch.tensor([0, 9])}, r"cu_seqlens_q: expected one packed row \(batch size 1\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name: str):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        flash_attention(*inputs(), **options)


def test_bad_tensors_are_named():
    q, k, v = inputs(query_heads=3)
    with pytest.raises(ValueError, match="q: expected a multiple of the 2 heads of k, got 3"):
        flash_attention(q, k, v)
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"v: expected shape \[B=2, Tk=9, H=2, V\], got \[2, 8, 2, 8\]"):
        flash_attention(q, k, v[:, 1:])
    with pytest.raises(ValueError, match=r"k: expected shape \[B=2, Tk, H, D=8\], got \[2, 9, 2, 7\]"):
        flash_attention(q, k[..., 1:], v)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected shape"):
        flash_attention(q[:1], k[:1], v[:1], cu_seqlens_q=torch.tensor([0, 4, 9]), cu_seqlens_k=torch.tensor([0, 9]))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("window", [None, 3])
def test_any_finite_scale(scale: float, window: int | None):
    q, k, v = (torch.randn(B, T, H, D).double() for _ in range(3))
    expected = flash_attention(q, k, v, scale=scale, window=window, backend="reference")
    torch.testing.assert_close(flash_attention(q, k, v, scale=scale, window=window), expected)
