"""The Triton step against the fp64 reference: every kind of gate, grouping, dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import (
    NormalizedState,
    gated_linear_attention_step,
    linear_attention_step,
    taylor_linear_attention_step,
)
from hybridattn.kernels.linear_attention.triton import decode

B = 2
GATES: dict[str, Callable[[int, int, int], tuple[int, ...]] | None] = {
    "none": None,
    "per channel": lambda t, h, k: (B, t, h, k),
    "per head": lambda t, h, k: (B, t, h),
    "constant": lambda t, h, k: (h,),
}
HEADS = {"plain": (3, 3, 3), "grouped queries": (4, 2, 2), "grouped values": (2, 2, 4)}  # of q, k, v
DIMS = [(8, 5), (16, 16), (33, 130)]  # K and V; the last one is two blocks of columns, and neither a power of two


def make(tokens: int, heads: tuple[int, int, int], dims: tuple[int, int], gate: str, gate_heads: int | None = None):
    (queries, keys, values), (key_dim, value_dim) = heads, dims
    q, k = (torch.randn(B, tokens, h, key_dim).double() for h in (queries, keys))
    v = torch.randn(B, tokens, values, value_dim).double()
    shape = GATES[gate]
    g = None if shape is None else -60 * torch.rand(shape(tokens, gate_heads or keys, key_dim)).double() ** 4
    return q, k, v, g, torch.randn(B, max(keys, values), key_dim, value_dim).double()


def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Run a step on a copy of the state with the same layout; returns outputs and the new state."""
    state = state.clone()
    if g is None:
        return linear_attention_step(q, k, v, state, backend=backend), state
    return gated_linear_attention_step(q, k, v, g, state, backend=backend), state


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("heads", "tokens", "dims"),
    [*(("grouped queries", 4, dims) for dims in DIMS), ("plain", 1, DIMS[0]), ("grouped values", 1, DIMS[2])],
)
@pytest.mark.parametrize("gate", GATES)
def test_triton_equals_reference(gate: str, heads: str, tokens: int, dims: tuple[int, int]):
    inputs = make(tokens, HEADS[heads], dims, gate)
    expected = run(*inputs, backend="reference")
    actual = run(*(x if x is None else x.float() for x in inputs), backend="triton")
    assert [x.dtype for x in actual] == [torch.float32, torch.float32]
    assert max(map(error, actual, expected)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(gate: str, dtype: torch.dtype):
    *inputs, state = make(3, HEADS["plain"], DIMS[2], gate)
    inputs = [x if x is None else x.to(dtype).double() for x in inputs]  # gates of -60 rounded are other gates
    o, after = run(*inputs, state, backend="reference")
    narrow = [x if x is None else x.to(dtype) for x in inputs]
    actual, actual_after = run(*narrow, state.float(), backend="triton")
    assert actual.dtype == dtype
    assert error(actual, o) <= 1.01 * error(o.to(dtype), o) + 1e-6  # rounded once, at the end
    assert error(actual_after, after) <= 1e-6


@pytest.mark.parametrize("gate", ["per channel", "per head", "constant"])
def test_gates_of_every_value_head(gate: str):
    inputs = make(2, HEADS["grouped values"], (8, 5), gate, gate_heads=4)
    actual = run(*(x.float() for x in inputs), backend="triton")
    assert max(map(error, actual, run(*inputs, backend="reference"))) <= 1e-6


def test_infinite_gates_forget_everything():
    q, k, v, g, state = (x.float() for x in make(1, HEADS["plain"], (8, 5), "per channel"))
    o, after = run(q, k, v, torch.full_like(g, -torch.inf), state, backend="triton")
    fresh = run(q, k, v, None, torch.zeros_like(state), backend="triton")
    assert torch.equal(o, fresh[0])
    assert torch.equal(after, fresh[1])


def test_strided_inputs_and_states_are_updated_in_place():
    q, k, v, g, state = (x.float() for x in make(3, HEADS["plain"], (8, 5), "per channel"))
    expected = run(q, k, v, g, state, backend="triton")
    scattered = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (q, k, v, g)]
    wider = torch.full((B, 3, 8, 7), torch.nan)  # rows of the state that are part of longer ones
    for kept in (wider[..., 1:6], torch.empty(B, 3, 5, 8).mT):
        o = gated_linear_attention_step(*scattered, kept.copy_(state), backend="triton")
        assert torch.equal(o, expected[0])
        assert torch.equal(kept, expected[1])
    assert wider[..., [0, 6]].isnan().all()


def test_mixed_dtypes():
    q, k, v, g, state = make(2, HEADS["plain"], (8, 5), "per channel")
    q, v = q.bfloat16(), v.half()
    expected = run(q.double(), k, v.double(), g, state, backend="reference")
    o, after = run(q, k.float(), v, g.float(), state.float(), backend="triton")
    assert o.dtype == torch.float16
    assert error(o, expected[0]) <= 1e-3
    assert error(after, expected[1]) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 1, 3, 8, 5), (2, 0, 3, 8, 5), (2, 1, 0, 8, 5), (2, 1, 3, 0, 5), (2, 1, 3, 8, 0)])
def test_empty_dimensions(shape: tuple[int, ...]):
    b, t, h, key_dim, value_dim = shape
    q, v, state = torch.randn(b, t, h, key_dim), torch.randn(b, t, h, value_dim), torch.randn(b, h, key_dim, value_dim)
    kept = state.clone()
    o = linear_attention_step(q, q, v, kept, scale=1.0, backend="triton")
    assert torch.equal(o, torch.zeros(b, t, h, value_dim))
    assert torch.equal(kept, state)


def test_operators_that_share_the_step():
    q, k, v = torch.randn(B, 2, 3, 4), torch.randn(B, 2, 3, 4), torch.randn(B, 2, 3, 5)
    for step, dim in ((linear_attention_step, 4), (taylor_linear_attention_step, 15)):
        outputs, states = [], []
        for backend in ("reference", "triton"):
            torch.manual_seed(1)
            joined = torch.rand(B, 3, dim, 6).double() + 1  # two views of one tensor, as after a prefill
            joined = joined if backend == "reference" else joined.float()
            state = NormalizedState(joined[..., :-1], joined[..., -1])
            x = [x.abs().to(joined.dtype) for x in (q, k, v)]
            outputs.append(step(*x, state, normalize=True, backend=backend))
            states.append(joined)
        assert error(outputs[1], outputs[0]) <= 1e-6
        assert error(states[1], states[0]) <= 1e-6


@pytest.mark.slow
def test_opcheck():
    q, k, v, g, state = (x.float() for x in make(2, HEADS["grouped queries"], (8, 5), "per channel"))
    for gate in (g, None):
        arguments = (q, k, v, gate, 0.7, state.clone())
        torch.library.opcheck(torch.ops.hybridattn.linear_attention_step_triton.default, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_mutates_the_state():
    q, k, v, g, state = (x.float() for x in make(1, HEADS["plain"], (8, 5), "per channel"))
    expected = run(q, k, v, g, state, backend="triton")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, g, state):
        return 2 * gated_linear_attention_step(q, k, v, g, state, backend="triton"), state + 1

    kept = state.clone()
    o, after = call(q, k, v, g, kept)
    assert torch.equal(o, 2 * expected[0])
    assert torch.equal(after, expected[1] + 1)
    assert torch.equal(kept, expected[1])


LACKS = {
    "q": (
        lambda q, k, v, g, s: (q.double(), k, v, g, s),
        "q: expected float32, float16 or bfloat16, got torch.float64",
    ),
    "state": (lambda q, k, v, g, s: (q, k, v, g, s.double()), "state: expected float32, got torch.float64"),
    "tokens": (
        lambda q, k, v, g, s: (*(x.repeat(1, 9, 1, 1) for x in (q, k, v, g)), s),
        "q: expected at most 8 tokens, got 9",
    ),
    "key dim": (
        lambda q, k, v, g, s: (
            *(x.repeat(1, 1, 1, 200) for x in (q, k)),
            v,
            g.repeat(1, 1, 1, 200),
            s.repeat(1, 1, 200, 1),
        ),
        "q: expected a key dim of at most 1024, got 1600",
    ),
}


@pytest.mark.parametrize("name", LACKS)
def test_the_named_backend_runs_or_raises(name: str):
    change, message = LACKS[name]
    inputs = change(*(x.float() for x in make(1, HEADS["plain"], (8, 5), "per channel")))
    with pytest.raises(ValueError, match=rf"{message} \(with backend='triton'\)"):
        gated_linear_attention_step(*inputs, backend="triton")
    gated_linear_attention_step(*inputs)  # without a name another backend runs


def test_the_operator_runs_the_op(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(decode, "step", lambda *x: calls.append(x))
    gated_linear_attention_step(*(x.float() for x in make(1, HEADS["plain"], (8, 5), "per head")), backend="triton")
    assert len(calls) == 1
