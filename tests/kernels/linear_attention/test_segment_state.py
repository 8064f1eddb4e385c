"""States of segments and of prefixes against the token-by-token reference."""

import pytest
import torch

from hybridattn.kernels.linear_attention import (
    SegmentState,
    features,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention_state,
    merge_states,
    prefix_linear_attention,
    taylor_linear_attention,
    taylor_linear_attention_step,
)

B, T, H, K, V = 2, 37, 3, 4, 5
GATES = {"none": None, "channel": (B, T, H, K), "head": (B, T, H), "constant": (H,)}


def make(gate: str, hot: float = 60.0):
    k, v = torch.randn(B, T, H, K).double(), torch.randn(B, T, H, V).double()
    shape = GATES[gate]
    return k, v, None if shape is None else -torch.rand(shape).double() * hot


def part(x: torch.Tensor | None, span: slice) -> torch.Tensor | None:
    return x if x is None or x.dim() == 1 else x[:, span]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("hot", [0.1, 60.0, torch.inf])
def test_the_state_equals_the_final_state_of_the_operator(gate: str, hot: float):
    k, v, g = make(gate, 0.1 if hot == torch.inf else hot)
    if g is not None and hot == torch.inf:
        g = torch.where(torch.rand(g.shape) < 0.2, -torch.inf, g)
    before = torch.randn(B, H, K, V).double()
    zero_gates = torch.zeros(H).double()
    _, expected = gated_linear_attention(
        k, k, v, zero_gates if g is None else g, initial_state=before, output_final_state=True, backend="reference"
    )
    state, decay = linear_attention_state(k, v, g)
    torch.testing.assert_close(decay[..., None] * before + state, expected)
    narrow = linear_attention_state(k.float(), v.float(), None if g is None else g.float())
    assert narrow.state.dtype == torch.float32
    torch.testing.assert_close(narrow.state, state.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "channel", "head"])
@pytest.mark.parametrize("cuts", [[], [0, 10, 11]])
def test_the_transition_of_the_delta_rule_is_a_matrix(gate: str, cuts: list[int]):
    k, v, g = make(gate)
    k, beta = torch.nn.functional.normalize(k, dim=-1), 2 * torch.rand(B, T, H).double()
    before = torch.randn(B, H, K, V).double()
    spans = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, T], strict=True)]
    merged, *others = [linear_attention_state(k[:, s], v[:, s], part(g, s), beta=beta[:, s]) for s in spans]
    for each in others:
        merged = merge_states(merged, each)
    _, expected = gated_delta_rule(k, k, v, g, beta, initial_state=before, output_final_state=True, backend="reference")
    assert merged.decay.shape == (B, H, K, K)
    torch.testing.assert_close(merged.decay @ before + merged.state, expected)
    with pytest.raises(ValueError, match=r"second.decay: expected 4 dimensions as first.decay, got 3"):
        merge_states(merged, linear_attention_state(k, v))


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_recurrence(gate: str):
    k, v, g = make(gate, 3.0)
    leaves = [x.requires_grad_() for x in (k, v, g) if x is not None]
    _, expected = gated_linear_attention(
        k, k, v, torch.zeros(H).double() if g is None else g, output_final_state=True, backend="reference"
    )
    weight = torch.randn_like(expected)
    truth = torch.autograd.grad((expected * weight).sum(), leaves)
    actual = torch.autograd.grad((linear_attention_state(k, v, g).state * weight).sum(), leaves)
    for x, y in zip(actual, truth, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cuts", [[10], [0, 1, 20], [37]])
def test_merged_parts_are_the_whole(gate: str, cuts: list[int]):
    k, v, g = make(gate)
    spans = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, T], strict=True)]
    parts = [linear_attention_state(part(k, s), part(v, s), part(g, s)) for s in spans]
    if gate == "constant":  # a gate per head has no time: each part decays by its own number of tokens
        assert torch.allclose(parts[0].decay[..., 0], (g * cuts[0]).exp().expand(B, H))
    merged = parts[0]
    for each in parts[1:]:
        merged = merge_states(merged, each)
    whole = linear_attention_state(k, v, g)
    torch.testing.assert_close(merged.state, whole.state)
    torch.testing.assert_close(merged.decay, whole.decay)
    if len(parts) > 2:
        torch.testing.assert_close(
            merge_states(parts[0], merge_states(parts[1], merge_states(*parts[2:]))), tuple(merged)
        )


@pytest.mark.parametrize("gate", ["none", "channel", "head", "constant"])
def test_packed_states(gate: str):
    k, v, g = make(gate)
    k, v, g = k[:1], v[:1], g if g is None or g.dim() == 1 else g[:1]
    ends = torch.tensor([0, 10, 10, 31])
    packed = linear_attention_state(k, v, g, cu_seqlens=ends)
    for n, span in enumerate((slice(0, 10), slice(10, 10), slice(10, 31))):
        alone = linear_attention_state(part(k, span), part(v, span), part(g, span))
        torch.testing.assert_close(packed.state[n], alone.state[0])
        torch.testing.assert_close(packed.decay[n], alone.decay[0])
    empty = linear_attention_state(k, v, g, cu_seqlens=torch.tensor([0]))
    assert empty.state.shape == (0, H, K, V)


def test_features_give_the_taylor_series_of_exp():
    x, y = torch.randn(7, 16).double(), torch.randn(7, 16).double()
    z = (x * y).sum(-1)
    assert features.count(16) == 153
    torch.testing.assert_close((features.taylor(x) * features.taylor(y)).sum(-1), 1 + z + z * z / 2)
    order = features.taylor(torch.tensor([2.0, 3.0, 5.0]))
    root = 2**-0.5
    torch.testing.assert_close(order, torch.tensor([1, 2, 3, 5, 4 * root, 6, 10, 9 * root, 15, 25 * root]))
    x.requires_grad_()
    weight = torch.randn(7, 153).double()
    (expected,) = torch.autograd.grad((features.taylor(x) * weight).sum(), x)
    torch.testing.assert_close(features.taylor_backward(x.detach(), weight), expected)


def prefix_formula(q, k, v, k_prefix, v_prefix, lengths, normalize):
    """The published formula, written out: weights of all earlier tokens and of the whole prefix."""

    def weight(a, b):
        z = torch.einsum("bthk,bshk->bhts", a, b) * K**-0.5
        return 1 + z + z * z / 2

    inside = torch.arange(k_prefix.shape[1]) < lengths[:, None]
    causal = weight(q, k).tril()
    prefix = weight(q, k_prefix) * inside[:, None, None]
    o = torch.einsum("bhts,bshv->bthv", causal, v) + torch.einsum("bhts,bshv->bthv", prefix, v_prefix)
    return o / (causal.sum(-1) + prefix.sum(-1)).transpose(1, 2)[..., None] if normalize else o


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("lengths", [None, [11, 11], [0, 7]])
def test_prefix_linear_attention(backend: str, normalize: bool, lengths: list[int] | None):
    q, k, k_prefix = (torch.randn(B, t, H, K).double() for t in (T, T, 11))
    v, v_prefix = torch.randn(B, T, H, V).double(), torch.randn(B, 11, H, V).double()
    leaves = [x.requires_grad_() for x in (q, k, v, k_prefix, v_prefix)]
    given = None if lengths is None else torch.tensor(lengths)
    expected = prefix_formula(*leaves, torch.tensor(lengths or [11, 11]), normalize)
    o, state = prefix_linear_attention(
        *leaves, prefix_lengths=given, normalize=normalize, output_final_state=True, backend=backend
    )
    torch.testing.assert_close(o, expected)
    weight = torch.randn_like(o)
    truth = torch.autograd.grad((expected * weight).sum(), leaves)
    for x, y in zip(torch.autograd.grad((o * weight).sum(), leaves), truth, strict=True):
        torch.testing.assert_close(x, y)
    if normalize:  # the state holds the prefix: BASED continues from it
        more = [torch.randn(B, 3, H, d).double() for d in (K, K, V)]
        longer = [torch.cat((x.detach(), y), 1) for x, y in zip((q, k, v), more, strict=True)]
        expected = prefix_formula(*longer, k_prefix, v_prefix, torch.tensor(lengths or [11, 11]), True)[:, T:]
        kept = type(state)(*(x.detach().clone() for x in state))
        torch.testing.assert_close(taylor_linear_attention(*more, initial_state=kept, backend=backend)[0], expected)
        torch.testing.assert_close(taylor_linear_attention_step(*more, kept, backend=backend), expected.detach())


def test_bad_input_is_named():
    k, v, g = make("channel")
    with pytest.raises(ValueError, match=r"v: expected shape \[B=2, T=37, H=3, V\], got \[2, 30, 3, 5\]"):
        linear_attention_state(k, v[:, :30], g)
    with pytest.raises(ValueError, match="g: expected natural-log decays <= 0"):
        linear_attention_state(k, v, -g)
    with pytest.raises(ValueError, match=r"g: expected shape \[H\], \[B, T, H\] or \[B, T, H, K\], got \[2, 37\]"):
        linear_attention_state(k, v, g[:, :, 0, 0])
    state = linear_attention_state(k, v, g)
    with pytest.raises(ValueError, match=r"second.state: expected shape \[N=2, H=3, K=4, V=5\], got \[2, 3, 4, 4\]"):
        merge_states(state, SegmentState(state.state[..., :4], state.decay))
    q, v_prefix = torch.randn(B, 3, H, K), torch.randn(B, 3, H, V)
    with pytest.raises(ValueError, match=r"prefix_lengths: expected 0 to 3, got \[1, 4\]"):
        prefix_linear_attention(q, q, v_prefix, q, v_prefix, prefix_lengths=torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"prefix_lengths: expected 0 to 3, got \[1, -1\]"):
        prefix_linear_attention(q, q, v_prefix, q, v_prefix, prefix_lengths=torch.tensor([1, -1]))
    with pytest.raises(ValueError, match=r"prefix_lengths: expected int32 or int64 on cpu, got torch.float32 on cpu"):
        prefix_linear_attention(q, q, v_prefix, q, v_prefix, prefix_lengths=torch.tensor([1.5, 2.0]))
    with pytest.raises(ValueError, match=r"k_prefix: expected shape \[N=2, M, H=3, K=4\]"):
        prefix_linear_attention(q, q, v_prefix, q[:1], v_prefix)
    for scale in (-1, 0):
        with pytest.raises(ValueError, match=f"scale: expected a positive number, got {scale}"):
            taylor_linear_attention(q, q, v_prefix, scale=scale)
