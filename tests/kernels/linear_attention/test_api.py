"""Steps and bad input of the linear-attention operators."""

import pytest
import torch

from hybridattn.kernels.linear_attention import (
    NormalizedState,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
)

B, T, H, K, V = 2, 9, 3, 8, 5


def inputs(tokens: int = T) -> tuple[torch.Tensor, ...]:
    return torch.randn(B, tokens, H, K), torch.randn(B, tokens, H, K), torch.randn(B, tokens, H, V)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("gate", ["none", "normalized", "channel", "head", "constant"])
def test_steps_equal_one_pass_and_update_the_state_in_place(gate: str, tokens: int, backend: str):
    q, k, v = (x.double() for x in inputs(tokens))
    state = torch.randn(B, H, K, V).double()
    g = {"channel": (B, tokens, H, K), "head": (B, tokens, H), "constant": (H,)}.get(gate)
    g = None if g is None else -torch.rand(g).double() * 60
    if gate == "normalized":
        q, k = q.exp(), k.exp()
        pair = NormalizedState(state, torch.rand(B, H, K).double())
        expected, final = linear_attention(q, k, v, normalize=True, initial_state=pair, output_final_state=True)
        kept = NormalizedState(*(x.clone() for x in pair))
        o = linear_attention_step(q, k, v, kept, normalize=True, backend=backend)
        torch.testing.assert_close(tuple(kept), tuple(final))
    elif g is None:
        expected, final = linear_attention(q, k, v, initial_state=state, output_final_state=True)
        kept = state.clone()
        o = linear_attention_step(q, k, v, kept, backend=backend)
        torch.testing.assert_close(kept, final)
    else:
        expected, final = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
        kept = state.clone()
        address = kept.data_ptr()
        o = gated_linear_attention_step(q, k, v, g, kept, backend=backend)
        torch.testing.assert_close(kept, final)
        assert kept.data_ptr() == address
    torch.testing.assert_close(o, expected)


def test_scale_multiplies_and_defaults_to_the_key_dim():
    q, k, v = inputs()
    default, half = linear_attention(q, k, v)[0], linear_attention(q, k, v, scale=K**-0.5 / 2)[0]
    torch.testing.assert_close(default, 2 * half)


BAD = {
    "q rank": (lambda q, k, v, g: (q[0], k, v, g), {}, r"q: expected shape \[B, T, Hq, K\], got \[9, 3, 8\]"),
    "k size": (
        lambda q, k, v, g: (q, k[:, :4], v, g),
        {},
        r"k: expected shape \[B=2, T=9, H, K=8\], got \[2, 4, 3, 8\]",
    ),
    "v heads": (
        lambda q, k, v, g: (q, k, v[:, :, :2], g),
        {},
        r"v: expected a multiple of the 3 heads of k, got 2",
    ),
    "q heads": (
        lambda q, k, v, g: (q[:, :, :2], k, v, g),
        {},
        "q: expected the 3 heads of k, or a multiple of those of k and v",
    ),
    "not a tensor": (lambda q, k, v, g: (q, k, None, g), {}, r"v: expected a tensor \[B, T, Hv, V\], got NoneType"),
    "integer": (lambda q, k, v, g: (q, k.long(), v, g), {}, "k: expected a floating-point dtype, got torch.int64"),
    "device": (lambda q, k, v, g: (q, k, v.to("meta"), g), {}, r"v: expected device cpu \(that of q\), got meta"),
    "positive gate": (lambda q, k, v, g: (q, k, v, g + 2), {}, "g: expected natural-log decays <= 0"),
    "nan gate": (lambda q, k, v, g: (q, k, v, g * torch.nan), {}, "g: expected natural-log decays <= 0 and not NaN"),
    "gate rank": (
        lambda q, k, v, g: (q, k, v, g[0, 0]),
        {},
        r"g: expected shape \[H\], \[B, T, H\] or .*, got \[3, 8\]",
    ),
    "gate size": (lambda q, k, v, g: (q, k, v, g[..., :5]), {}, r"g: expected shape \[B=2, T=9, H=3, K=8\], got"),
    "backend": (
        lambda *x: x,
        {"backend": "cuda"},
        r"backend: expected one of \['reference', 'torch', 'triton', None\], got 'cuda'",
    ),
    "state": (
        lambda *x: x,
        {"initial_state": torch.zeros(B, H, V, K)},
        r"initial_state: expected shape \[N=2, Hs=3, K=8",
    ),
    "packed batch": (lambda *x: x, {"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: expected one packed row"),
    "scale": (lambda *x: x, {"scale": float("nan")}, "scale: expected a finite number or None, got nan"),
    "list of offsets": (lambda *x: x, {"cu_seqlens": [0, 9]}, "cu_seqlens: expected a tensor of integer offsets"),
    "float offsets": (lambda *x: x, {"cu_seqlens": torch.tensor([0.0, 9])}, "cu_seqlens: expected integer offsets"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str):
    change, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(*change(*inputs(), -torch.rand(B, T, H, K)), **options)


def test_queries_and_values_cannot_both_be_grouped():
    q, k, v = torch.randn(B, T, 4, K), torch.randn(B, T, 2, K), torch.randn(B, T, 4, V)
    with pytest.raises(ValueError, match="q: expected the 2 heads of k, or a multiple of those of k and v, got 4"):
        linear_attention(q, k, v)


@pytest.mark.parametrize("offsets", [[1, 9], [0, 5, 3, 9], [0, 10], [0, -1]])
def test_bad_offsets(offsets: list[int]):
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending offsets from 0 to at most 9 tokens, got"):
        linear_attention(*(x[:1] for x in inputs()), cu_seqlens=torch.tensor(offsets))


def test_normalized_state_is_a_pair():
    with pytest.raises(ValueError, match="initial_state: expected a NormalizedState"):
        linear_attention(*inputs(), normalize=True, initial_state=torch.zeros(B, H, K, V))
    with pytest.raises(ValueError, match="state: expected a NormalizedState"):
        linear_attention_step(*inputs(1), torch.zeros(B, H, K, V), normalize=True)


def test_step_rejects_inputs_that_require_gradients():
    q, k, v = inputs(1)
    with pytest.raises(ValueError, match=r"state: expected inputs without gradients .* use torch.no_grad\(\)"):
        linear_attention_step(q.requires_grad_(), k, v, torch.zeros(B, H, K, V))


def test_step_rejects_a_16_bit_state():
    with pytest.raises(ValueError, match=r"state: expected float32 or float64, got torch.bfloat16"):
        linear_attention_step(*inputs(1), torch.zeros(B, H, K, V).bfloat16())


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_step_sums_in_fp32_under_autocast(tokens: int):
    x, state = [x.bfloat16().float() for x in inputs(tokens)], torch.randn(B, H, K, V)
    kept = state.clone()
    expected = linear_attention_step(*x, kept)
    with torch.autocast("cpu", torch.bfloat16):
        o = linear_attention_step(*x, state)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, kept)
