"""The laws of DESIGN.md for every operator in OPERATORS.

Softmax attention has no state. In place of a law about states, later queries over all keys give the later outputs.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridattn.kernels.flash_attention import BlockMask, flash_attention
from hybridattn.kernels.linear_attention import (
    features,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    taylor_linear_attention,
)

BATCH, HEADS, KEY, VALUE = 2, 3, 8, 5
LENGTHS = [0, 1, 7, 64, 65, 200]
GATES = {
    "mild": lambda shape: -torch.rand(shape).double() * 0.1,
    "strong": lambda shape: -torch.rand(shape).double() * 5,
    "hot": lambda shape: -torch.rand(shape).double() * 60,
    "all -60": lambda shape: torch.full(shape, -60.0).double(),
    "resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -60.0, -0.05 * torch.rand(shape)).double(),
    "infinite resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -torch.inf, -0.05).double(),
}


class Operator(NamedTuple):
    call: Callable[..., Any]
    gate_shape: Callable[[int], tuple[int, ...]] | None = None
    query_heads: int = HEADS
    value_heads: int = HEADS
    delta: bool = False  # the last input is beta
    positive_keys: bool = False  # a normaliser near zero would amplify every error
    has_state: bool = True
    state_dim: int = KEY  # dim of the keys, or number of features, in the state
    pair: bool = False  # the state is a NormalizedState
    causal: bool = True
    cuts: bool = True  # whether the options also hold for a part of the sequence, unlike a block mask


def softmax(query_heads: int = HEADS, causal: bool = True, **options: Any) -> Operator:
    call = partial(flash_attention, causal=causal, **options)
    return Operator(call, query_heads=query_heads, has_state=False, causal=causal)


def every_other_block(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Run attention with blocks of 16 tokens, each of which attends to itself and to the even blocks."""
    blocks = -(-q.shape[1] // 16)
    live = (torch.arange(blocks) % 2 == 0) | torch.eye(blocks, dtype=torch.bool)
    return flash_attention(q, k, v, block_mask=BlockMask.from_dense(live, 16), **options)


def delta(gate_shape: Callable[[int], tuple[int, ...]] | None = None, **options: Any) -> Operator:
    """The delta rule with keys of norm 1, without which states would grow without bound."""

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: Any) -> Any:
        *g, beta = rest
        return gated_delta_rule(q, k, v, g[0] if g else None, beta, normalize_qk=True, **options)

    return Operator(call, gate_shape, delta=True, **options)


OPERATORS = {
    "linear": Operator(linear_attention),
    "linear, normalized": Operator(
        lambda *x, **options: linear_attention(*x, normalize=True, **options), positive_keys=True, pair=True
    ),
    "gated per channel": Operator(gated_linear_attention, lambda t: (BATCH, t, HEADS, KEY)),
    "gated per head": Operator(gated_linear_attention, lambda t: (BATCH, t, HEADS)),
    "gated constant": Operator(gated_linear_attention, lambda t: (HEADS,)),
    "linear, normalized, grouped queries": Operator(
        lambda *x, **options: linear_attention(*x, normalize=True, **options),
        positive_keys=True,
        pair=True,
        query_heads=2 * HEADS,
    ),
    "linear, normalized, grouped values": Operator(
        lambda *x, **options: linear_attention(*x, normalize=True, **options),
        positive_keys=True,
        pair=True,
        value_heads=2 * HEADS,
    ),
    "gated per channel, grouped queries": Operator(
        gated_linear_attention, lambda t: (BATCH, t, HEADS, KEY), query_heads=2 * HEADS
    ),
    "gated per head, grouped queries": Operator(gated_linear_attention, lambda t: (BATCH, t, HEADS), query_heads=9),
    "gated per channel, grouped values": Operator(
        gated_linear_attention, lambda t: (BATCH, t, HEADS, KEY), value_heads=2 * HEADS
    ),
    "gated per value head": Operator(gated_linear_attention, lambda t: (BATCH, t, 2 * HEADS), value_heads=2 * HEADS),
    "taylor": Operator(taylor_linear_attention, state_dim=features.count(KEY), pair=True),
    "taylor, not normalized": Operator(
        lambda *x, **options: taylor_linear_attention(*x, normalize=False, scale=0.4, **options),
        state_dim=features.count(KEY),
    ),
    "delta": delta(),
    "delta, gated per channel": delta(lambda t: (BATCH, t, HEADS, KEY)),
    "delta, gated per head": delta(lambda t: (BATCH, t, HEADS)),
    "delta, gated per channel, grouped queries": delta(lambda t: (BATCH, t, HEADS, KEY), query_heads=2 * HEADS),
    "delta, gated per value head": delta(lambda t: (BATCH, t, 2 * HEADS), value_heads=2 * HEADS),
    "softmax": softmax(),
    "softmax, grouped heads": softmax(2 * HEADS),
    "softmax, window 1": softmax(window=1),
    "softmax, window 20": softmax(window=20),
    "softmax, window 70, grouped heads": softmax(2 * HEADS, window=70),
    "softmax, window (20, 5)": softmax(causal=False, window=(20, 5)),
    "softmax, ALiBi": softmax(alibi_slopes=torch.tensor([0.5, 0.01, 4.0])),
    "softmax, ALiBi, to both sides": softmax(causal=False, alibi_slopes=torch.tensor([0.5, 0.01, 4.0])),
    "softmax, softcap, grouped heads": softmax(2 * HEADS, softcap=1.5),
    "softmax, sinks, window 20": softmax(sinks=torch.tensor([0.3, -1.0, 2.0]), window=20),
    "softmax, block mask": Operator(every_other_block, has_state=False, cuts=False),
}
CASES = [(name, gates) for name, op in OPERATORS.items() for gates in (GATES if op.gate_shape else ["none"])]
# Every operator and gate at every length, and without an initial state at two of them; `make test-fast` has one length.
LAWS = [(name, gates, tokens, OPERATORS[name].has_state) for name, gates in CASES for tokens in LENGTHS]
LAWS += [(name, gates, tokens, False) for name, gates in CASES if OPERATORS[name].has_state for tokens in (1, 200)]
LAWS = [law if law[2] == 65 else pytest.param(*law, marks=pytest.mark.slow) for law in LAWS]
STATEFUL = [name for name, op in OPERATORS.items() if op.has_state]
CUTS = [name for name, op in OPERATORS.items() if op.cuts]


def make_inputs(op: Operator, tokens: int, gates: str = "strong") -> list[Tensor]:
    q = torch.randn(BATCH, tokens, op.query_heads, KEY).double()
    k = torch.randn(BATCH, tokens, HEADS, KEY).double()
    v = torch.randn(BATCH, tokens, op.value_heads, VALUE).double()
    if op.positive_keys:
        q, k = q.exp(), k.exp()
    g = [] if op.gate_shape is None else [GATES[gates](op.gate_shape(tokens))]
    return [q, k, v, *g, *([2 * torch.rand(BATCH, tokens, op.value_heads).double()] if op.delta else [])]


def make_state(op: Operator) -> Any:
    """Return a state as it is after earlier tokens."""
    if not op.has_state:
        return None
    k = torch.randn(BATCH, op.value_heads, 9, op.state_dim).double()
    k = features.taylor(k[..., :KEY]) if op.state_dim != KEY else k.exp() if op.positive_keys else k
    kv = k.mT @ torch.randn(BATCH, op.value_heads, 9, VALUE).double()
    return (kv, k.sum(-2)) if op.pair else kv


def to(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if state is None:
        return None
    return tuple(change(x) for x in state) if isinstance(state, tuple) else change(state)


def flat(state: Any) -> list[Tensor]:
    return [] if state is None else list(state) if isinstance(state, tuple) else [state]


def run(op: Operator, inputs: list[Tensor], state: Any = None, **options: Any) -> list[Tensor]:
    """Return outputs and, for operators with a state, the tensors of the final state."""
    if not op.has_state:
        return [op.call(*inputs, **options)]
    o, final = op.call(*inputs, initial_state=state, output_final_state=True, **options)
    return [o, *flat(final)]


def run_backward(op: Operator, inputs: list[Tensor], state: Any, grads: list[Tensor], backend: str, dtype: torch.dtype):
    """Return outputs, states and the gradients of inputs and initial state; states are fp32 or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.detach().to(dtype if x.dim() > 1 else wide, copy=True).requires_grad_() for x in inputs]
    state = to(state, lambda x: x.detach().to(wide, copy=True).requires_grad_())
    results = run(op, inputs, state, backend=backend)
    leaves = [*inputs, *flat(state)]
    loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(results, grads, strict=True))
    # The term of zeros connects the loss to the inputs when there are no tokens.
    (loss + sum(0 * x.sum() for x in leaves if x.isfinite().all())).backward()
    return [x.detach() for x in results], [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; the absolute one if ``expected`` is zero."""
    assert actual.shape == expected.shape
    norm = expected.double().norm()
    distance = (actual.double() - expected.double()).norm()
    return (distance / norm if norm > 0 else distance).item()


@pytest.mark.parametrize(("name", "gates", "tokens", "with_state"), LAWS)
def test_reference_equals_torch(name: str, gates: str, tokens: int, with_state: bool):
    op = OPERATORS[name]
    inputs, state = make_inputs(op, tokens, gates), make_state(op) if with_state else None
    grads = [torch.randn_like(x) for x in run(op, inputs, state, backend="reference")]
    expected, expected_grads = run_backward(op, inputs, state, grads, "reference", torch.float64)
    if op.pair and tokens == 1 and not with_state:
        expected_grads[0] = torch.zeros_like(inputs[0])  # o is v, whatever q is
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        results, results_grads = run_backward(op, inputs, state, grads, "torch", dtype)
        assert max(map(error, results, expected)) <= tolerance
        assert max(map(error, results_grads, expected_grads)) <= 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(name: str, backend: str, dtype: torch.dtype):
    op = OPERATORS[name]
    inputs = make_inputs(op, 200, "mild")
    exact = run(op, inputs, backend="reference")
    rounded = [x.to(dtype).double() if x.dim() > 1 else x for x in inputs]
    of_rounded = run(op, rounded, backend="reference")
    of_rounded[0] = of_rounded[0].to(dtype)  # outputs are of the operands' type
    actual = run(op, [x.to(dtype) if x.dim() > 1 else x.float() for x in inputs], backend=backend)
    assert actual[0].dtype == dtype
    assert all(x.dtype == torch.float32 for x in actual[1:])
    for result, formula, truth in zip(actual, of_rounded, exact, strict=True):
        assert error(result, truth) <= 1.5 * error(formula, truth)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_sixteen_bit_operands_are_rounded_once(name: str):
    """Backward computes in fp32 on the 16-bit operands: its results differ from fp64 by the final rounding only."""
    op = OPERATORS[name]
    inputs = [x.bfloat16().double() if x.dim() > 1 else x.float().double() for x in make_inputs(op, 70, "mild")]
    grads = [torch.randn_like(x).bfloat16().double() for x in run(op, inputs, backend="reference")]
    _, expected = run_backward(op, inputs, None, grads, "reference", torch.float64)
    _, actual = run_backward(op, inputs, None, grads, "torch", torch.bfloat16)
    for gradient, truth in zip(actual, expected, strict=True):
        rounded = error(truth.to(gradient.dtype), truth)
        assert error(gradient, truth) <= (1.1 * rounded if op.has_state else 3 * rounded) + 1e-4


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", STATEFUL)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(cuts=st.lists(st.integers(0, 150), max_size=4).map(sorted))
def test_any_split_with_the_state_carried_over(name: str, backend: str, cuts: list[int]):
    op = OPERATORS[name]
    inputs, state = make_inputs(op, 150), make_state(op)
    o, *final = run(op, inputs, state, backend=backend)
    parts = []
    for first, last in pairwise([0, *cuts, 150]):
        part = [x[:, first:last] if x.dim() > 1 else x for x in inputs]
        out, *kept = run(op, part, state, backend=backend)
        state = tuple(kept) if isinstance(state, tuple) else kept[0]
        parts.append(out)
    assert error(torch.cat(parts, 1), o) <= 1e-12
    assert max(map(error, flat(state), final)) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", [n for n in CUTS if n not in STATEFUL])
@pytest.mark.parametrize("cut", [0, 1, 30, 149, 150])
def test_later_queries_against_all_keys(name: str, backend: str, cut: int):
    op = OPERATORS[name]
    q, k, v = make_inputs(op, 150)
    assert error(run(op, [q[:, cut:], k, v], backend=backend)[0], run(op, [q, k, v])[0][:, cut:]) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [[], [0], [130], [3, 0, 70, 1, 64], [128, 2]])
@pytest.mark.parametrize("name", CUTS)
def test_packed_equals_one_by_one(name: str, backend: str, lengths: list[int]):
    op, rest = OPERATORS[name], 4  # tokens past the last offset belong to no sequence
    tokens = sum(lengths) + rest
    inputs = [x[:1] if x.dim() > 1 else x for x in make_inputs(op, tokens)]
    states = [to(make_state(op), lambda x: x[:1].clone().requires_grad_()) for _ in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed_state = None
    if op.has_state and lengths:
        packed = [torch.cat(x).detach().requires_grad_() for x in zip(*map(flat, states), strict=True)]
        packed_state = packed_leaves = tuple(packed) if op.pair else packed[0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    offsets = {"cu_seqlens": ends} if op.has_state else {"cu_seqlens_q": ends}
    o, *final = run(op, leaves, packed_state, backend=backend, **offsets)
    weight = torch.randn_like(o)
    if not ends[-1]:
        assert not o.any()
        return
    ((o * weight)[:, : ends[-1]].sum() + sum(x.sum() for x in final)).backward()
    single = [x.clone().requires_grad_() for x in inputs]
    for n, (first, last) in enumerate(pairwise(ends)):
        part = [x[:, first:last] if x.dim() > 1 else x for x in single]
        expected, *kept = run(op, part, states[n], backend="reference")
        assert error(o[:, first:last], expected) <= 1e-12
        assert all(error(x[n : n + 1], y) <= 1e-12 for x, y in zip(final, kept, strict=True))
        if first < last or kept:
            ((expected * weight[:, first:last]).sum() + sum(x.sum() for x in kept)).backward()
    assert not o[:, ends[-1] :].any()
    for x, y in zip(leaves, single, strict=True):
        assert error(x.grad, y.grad) <= 1e-11
    if packed_state is not None:  # every sequence's own initial state gets its own gradient
        for x, y in zip(flat(packed_leaves), zip(*map(flat, states), strict=True), strict=True):
            none = torch.zeros_like(x.grad[:1])
            expected = torch.cat([none if z.grad is None else z.grad for z in y])
            assert error(x.grad, expected) <= 1e-11


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", [n for n, op in OPERATORS.items() if op.causal])
def test_causal(name: str, backend: str):
    op, t = OPERATORS[name], 77
    inputs = make_inputs(op, 150)
    changed = [torch.cat((x[:, :t], x[:, t:].flip(1)), 1) if x.dim() > 1 else x for x in inputs]
    before, after = (run(op, x, backend=backend)[0] for x in (inputs, changed))
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=0 if backend == "reference" else 1e-12)
    assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_again_and_beside_other_rows(name: str):
    op = OPERATORS[name]
    inputs = [x.float() for x in make_inputs(op, 130)]
    first, again = run(op, inputs), run(op, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    alone = run(op, [x[:1] if x.dim() > 1 else x for x in inputs])
    assert all(error(x, y[:1]) <= 1e-6 for x, y in zip(alone, first, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name: str):
    op = OPERATORS[name]
    inputs = [x[..., :2].clone().requires_grad_() if x.dim() > 3 else x.requires_grad_() for x in make_inputs(op, 18)]
    assert torch.autograd.gradcheck(lambda *x: tuple(run(op, list(x))), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_strided_inputs_and_mixed_dtypes(name: str, backend: str):
    op = OPERATORS[name]
    inputs = make_inputs(op, 70)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert error(run(op, strided, backend=backend)[0], run(op, inputs, backend=backend)[0]) <= 1e-12
    mixed = [inputs[0].float(), inputs[1].bfloat16(), inputs[2].float(), *(x.float() for x in inputs[3:])]
    assert run(op, mixed, backend=backend)[0].dtype == torch.float32


@pytest.mark.parametrize("shape", ["batch", "heads"])
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_dimensions(name: str, shape: str):
    op = OPERATORS[name]
    if shape == "batch":
        inputs = [x[:0] if x.dim() > 1 else x for x in make_inputs(op, 9)]
        assert run(op, inputs)[0].shape == (0, 9, max(op.query_heads, op.value_heads), VALUE)
    elif op.has_state:
        inputs = [x[:, :, :0] if x.dim() > 1 else x[:0] for x in make_inputs(op, 9)]
        assert run(op, inputs)[0].shape == (BATCH, 9, 0, VALUE)


def test_autocast_is_respected():
    for name, op in OPERATORS.items():
        inputs = [x.float() for x in make_inputs(op, 20)]
        with torch.autocast("cpu", torch.bfloat16):
            results, plain = run(op, inputs), run(op, inputs, backend="reference")
        assert results[0].dtype == torch.bfloat16, name
        assert all(x.dtype == torch.float32 for x in results[1:]), name
        rounded = [x.bfloat16() if x.dim() > 1 else x for x in inputs[:3]] + inputs[3:]
        for result, again, expected in zip(results, plain, run(op, rounded, backend="reference"), strict=True):
            assert error(result, expected) <= (4e-3 if result.dtype == torch.bfloat16 else 1e-5), name
            assert torch.equal(again, expected), name


@pytest.mark.parametrize("name", STATEFUL)
def test_double_backward_raises(name: str):
    op = OPERATORS[name]
    inputs = [x.requires_grad_() for x in make_inputs(op, 20)]
    (grad,) = torch.autograd.grad(run(op, inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
