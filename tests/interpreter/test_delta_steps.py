"""The Triton step of the gated delta rule against the fp64 reference, and its memory traffic."""

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import gated_delta_rule_step
from hybridattn.kernels.linear_attention.triton import decode
from hybridattn.kernels.linear_attention.triton.compile_cases import step_traffic
from hybridattn.kernels.linear_attention.triton.launch import step_launch
from hybridattn.workshop.traffic import Moved, count_traffic, over_target

B = 2
GATES = {"none": None, "per channel": "BTHK", "per head": "BTH", "constant": "H"}
HEADS = {"plain": (3, 3, 3), "grouped queries": (4, 2, 2), "grouped values": (2, 2, 4)}  # of q, k, v
DIMS = [(8, 5), (33, 130)]  # K and V; the last one is two blocks of columns, and neither a power of two


def make(tokens: int, heads: tuple[int, int, int], dims: tuple[int, int], gate: str, gate_heads: int | None = None):
    """Return q, k, v, g, beta and the state in fp64; a quarter of the tokens write nothing."""
    (queries, keys, values), (key_dim, value_dim) = heads, dims
    q, k = (torch.randn(B, tokens, h, key_dim).double() for h in (queries, keys))
    v = torch.randn(B, tokens, values, value_dim).double()
    sizes = {"B": B, "T": tokens, "H": gate_heads or keys, "K": key_dim}
    letters = GATES[gate]
    g = None if letters is None else -60 * torch.rand([sizes[c] for c in letters]).double() ** 4
    beta = (2.5 * torch.rand(B, tokens, values).double() - 0.5).clamp(min=0)
    return [q, k, v, g, beta, torch.randn(B, values, key_dim, value_dim).double()]


def run(x: list, backend: str | None, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Run a step on a copy of the state with the same layout; returns outputs and the new state."""
    *inputs, state = x
    state = state.clone()
    return gated_delta_rule_step(*inputs, state, normalize_qk=normalize, backend=backend), state


def to(x: list, dtype: torch.dtype) -> list:
    return [y if y is None else y.float() if y is x[-1] else y.to(dtype) for y in x]


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("gate", GATES)
def test_triton_equals_reference(gate: str, heads: str, tokens: int):
    x = make(tokens, HEADS[heads], DIMS[0], gate)
    actual = run(to(x, torch.float32), "triton")
    assert [y.dtype for y in actual] == [torch.float32, torch.float32]
    assert max(map(error, actual, run(x, "reference"))) <= 1e-6


@pytest.mark.parametrize("gate", ["per channel", "per head"])
def test_two_blocks_of_columns_and_gates_of_every_value_head(gate: str):
    x = make(3, HEADS["grouped values"], DIMS[1], gate, gate_heads=4)
    assert max(map(error, run(to(x, torch.float32), "triton"), run(x, "reference"))) <= 1e-6


def test_keys_that_are_normal_already():
    x = make(3, HEADS["plain"], DIMS[0], "per head")
    x[1] /= x[1].norm(dim=-1, keepdim=True)
    assert max(map(error, run(to(x, torch.float32), "triton", False), run(x, "reference", False))) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(gate: str, dtype: torch.dtype):
    x = make(3, HEADS["plain"], DIMS[1], gate)
    x = [y if y is None else y.to(dtype).double() for y in x]
    o, after = run(x, "reference")
    actual, actual_after = run(to(x, dtype), "triton")
    assert actual.dtype == dtype
    assert error(actual, o) <= 1.01 * error(o.to(dtype), o) + 1e-6  # rounded once, at the end
    assert error(actual_after, after) <= 1e-6


def test_infinite_gates_forget_everything():
    q, k, v, g, beta, state = to(make(1, HEADS["plain"], DIMS[0], "per channel"), torch.float32)
    o, after = run([q, k, v, torch.full_like(g, -torch.inf), beta, state], "triton")
    fresh = run([q, k, v, None, beta, torch.zeros_like(state)], "triton")
    assert torch.equal(o, fresh[0])
    assert torch.equal(after, fresh[1])


def test_strided_inputs_and_states_are_updated_in_place():
    *inputs, state = to(make(3, HEADS["plain"], DIMS[0], "per channel"), torch.float32)
    expected = run([*inputs, state], "triton")
    scattered = [y.transpose(0, -1).contiguous().transpose(0, -1) for y in inputs]
    wider = torch.full((B, 3, 8, 7), torch.nan)  # rows of the state that are part of longer ones
    for kept in (wider[..., 1:6], torch.empty(B, 3, 5, 8).mT):
        o = gated_delta_rule_step(*scattered, kept.copy_(state), normalize_qk=True, backend="triton")
        assert torch.equal(o, expected[0])
        assert torch.equal(kept, expected[1])
    assert wider[..., [0, 6]].isnan().all()


@pytest.mark.parametrize("empty", [(0, 1, 3, 8, 5), (2, 0, 3, 8, 5), (2, 1, 0, 8, 5), (2, 1, 3, 0, 5), (2, 1, 3, 8, 0)])
def test_empty_dimensions(empty: tuple[int, ...]):
    b, t, h, key_dim, value_dim = empty
    q, v, state = torch.randn(b, t, h, key_dim), torch.randn(b, t, h, value_dim), torch.randn(b, h, key_dim, value_dim)
    kept = state.clone()
    o = gated_delta_rule_step(q, q, v, None, torch.rand(b, t, h), kept, scale=1.0, backend="triton")
    assert torch.equal(o, torch.zeros(b, t, h, value_dim))
    assert torch.equal(kept, state)


@pytest.mark.slow
def test_opcheck():
    q, k, v, g, beta, state = to(make(2, HEADS["grouped queries"], DIMS[0], "per channel"), torch.float32)
    for gate in (g, None):
        arguments = (q, k, v, gate, beta, 0.7, True, state.clone())
        torch.library.opcheck(torch.ops.hybridattn.gated_delta_rule_step_triton.default, arguments)


def test_the_named_backend_runs_or_raises():
    x = to(make(17, HEADS["plain"], DIMS[0], "per channel"), torch.float32)
    with pytest.raises(ValueError, match=r"q: expected at most 16 tokens, got 17 \(with backend='triton'\)"):
        run(x, "triton")
    run(x, None)  # without a name another backend runs


@pytest.mark.parametrize("dims", [(16, 16), (24, 130)])
@pytest.mark.parametrize("heads", [(2, 2, 2), (6, 2, 2), (2, 2, 4)])
def test_a_step_moves_no_more_than_declared(dims: tuple[int, int], heads: tuple[int, int, int]):
    q, k, v, g, beta, state = to(make(16, heads, dims, "per channel"), torch.bfloat16)
    with count_traffic() as launches:
        o = decode.delta_step(q, k, v, g, beta, 1.0, True, state)
    (launch,) = launches
    x = {"q": q, "k": k, "v": v, "g": g, "state": state, "beta": beta}
    assert over_target(launch, step_traffic(step_launch("sm_90", dims[0]), *x.values()), {**x, "o": o}) == []
    size = state.numel() * 4
    assert launch.loads["state"] == launch.stores["state"] == Moved(size, size)  # once for all tokens
