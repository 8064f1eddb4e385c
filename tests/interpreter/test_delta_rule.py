"""The chunked gated delta rule in Triton against the fp64 reference: the laws of DESIGN.md, at small sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import gated_delta_rule
from hybridattn.workshop.traffic import count_traffic

GATES: dict[str, Callable[[Any], Tensor]] = {
    "mild": lambda shape: -0.1 * torch.rand(shape),
    "hot": lambda shape: -60 * torch.rand(shape),
    "all -60": lambda shape: torch.full(shape, -60.0),
    "resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -60.0, -0.05 * torch.rand(shape)),
    "infinite resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -torch.inf, -0.05),
}
CASES = [(shape, gates) for shape in ("per channel", "per head") for gates in GATES] + [("none", "none")]
HEADS = {"grouped queries": (4, 2, 2), "grouped values": (1, 1, 2), "both kinds": (2, 2, 4)}  # of q, k, v
# K and V: rows that descriptors can load, rows that they cannot, two blocks of keys (one partial), two of values.
DIMS = [(20, 5), (72, 8), (16, 72), (1, 8), (8, 1)]


def make(
    tokens: int,
    dims: tuple[int, int] = (8, 8),
    case: tuple[str, str] = ("per channel", "resets"),
    heads: tuple[int, int, int] = (1, 1, 1),
    gate_heads: int | None = None,
    sequences: int = 1,
) -> list[Tensor]:
    """Return q, k, v, beta, the initial state and, unless there are none, g: in fp64. Some of beta are 0."""
    (shape, gates), (key_dim, value_dim) = case, dims
    q, k, v = (torch.randn(1, tokens, h, d) for h, d in zip(heads, (key_dim, key_dim, value_dim), strict=True))
    beta = (2.2 * torch.rand(1, tokens, heads[2]) - 0.2).clamp(min=0)
    x = [q, k, v, beta, torch.randn(sequences, heads[2], key_dim, value_dim)]
    if shape != "none":
        channels = [key_dim] if shape == "per channel" else []
        x.append(GATES[gates]([1, tokens, gate_heads or heads[1], *channels]))
    return [y.double() for y in x]


def run(x: list[Tensor], backend: str, normalize: bool = True, **options: Any) -> list[Tensor]:
    q, k, v, beta, state, *g = x
    options = {"initial_state": state, "output_final_state": True, "normalize_qk": normalize, **options}
    o, final = gated_delta_rule(q, k, v, g[0] if g else None, beta, backend=backend, **options)
    assert final is not None
    return [o, final]


def to(x: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Inputs in a dtype; the state in fp32, or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [y.to(wide if n == 4 else dtype) for n, y in enumerate(x)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; the absolute one if ``expected`` is zero."""
    assert actual.shape == expected.shape
    norm, distance = expected.double().norm(), (actual.double() - expected.double()).norm()
    return (distance / norm if norm > 0 else distance).item()


@pytest.mark.parametrize(
    ("case", "tokens"),
    [pytest.param(case, 200, marks=pytest.mark.slow) for case in CASES]
    + [(case, tokens) for case in (CASES[1], CASES[6], CASES[-1]) for tokens in (0, 1, 7, 64, 65)],
)
def test_triton_equals_reference(case: tuple[str, str], tokens: int):
    x = make(tokens, case=case)
    actual = run(to(x, torch.float32), "triton")
    assert max(map(error, actual, run(x, "reference"))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dims", DIMS)
def test_dims(dims: tuple[int, int]):
    x = make(70, dims)
    assert max(map(error, run(to(x, torch.float32), "triton"), run(x, "reference"))) <= 1e-5


def test_keys_that_are_normal_already():
    x = make(70)
    x[1] /= x[1].norm(dim=-1, keepdim=True)
    assert max(map(error, run(to(x, torch.float32), "triton", False), run(x, "reference", False))) <= 1e-5


def test_equal_keys():
    """The powers of A are far larger than the inverse of I + A."""
    x = make(70, case=("none", "none"))
    x[1], x[3] = x[1][:, :1].expand_as(x[1]), torch.full_like(x[3], 1.5)
    assert max(map(error, run(to(x, torch.float32), "triton"), run(x, "reference"))) <= 1e-5


@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads(heads: str):
    for gate_heads in sorted(set(HEADS[heads][1:])):
        x = make(70, heads=HEADS[heads], gate_heads=gate_heads)
        assert max(map(error, run(to(x, torch.float32), "triton"), run(x, "reference"))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [("per channel", "resets"), ("per head", "hot")], ids=", ".join)
@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 70, 1, 64], [128, 2], [1, 65]])
def test_packed_equals_one_by_one(lengths: list[int], case: tuple[str, str]):
    x = make(sum(lengths) + 4, case=case, sequences=len(lengths))  # 4 tokens belong to no sequence
    ends = torch.tensor([0, *lengths]).cumsum(0)
    actual = run(to(x, torch.float32), "triton", cu_seqlens=ends)
    assert not actual[0][:, ends[-1] :].any()
    assert max(map(error, actual, run(x, "reference", cu_seqlens=ends))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_sixteen_bit_errors_are_close_to_those_of_rounded_operands(case: tuple[str, str], dtype: torch.dtype):
    """The error is at most 1.5 times that of the fp64 formula whose operands are rounded once."""
    x = make(200, (32, 24), case, (2, 2, 2))
    exact, narrow = run(x, "reference"), to(x, dtype)
    formula = run(to(narrow, torch.float64), "reference")
    actual = run(narrow, "triton")
    assert [y.dtype for y in actual] == [dtype, torch.float32]
    for result, truth, of_rounded in zip(actual, exact, formula, strict=True):
        assert error(result, truth) <= 1.5 * error(of_rounded.to(result.dtype), truth) + 1e-6


@pytest.mark.parametrize("empty", [(0, 3, 1, 8, 5), (1, 3, 0, 8, 5), (1, 3, 1, 0, 5), (1, 3, 1, 8, 0)])
def test_empty_dimensions(empty: tuple[int, ...]):
    b, t, h, key_dim, value_dim = empty
    q, v, state = torch.randn(b, t, h, key_dim), torch.randn(b, t, h, value_dim), torch.randn(b, h, key_dim, value_dim)
    o, final = run([q, q, v, torch.rand(b, t, h), state], "triton", scale=1.0)
    assert torch.equal(o, torch.zeros(b, t, h, value_dim))
    assert torch.equal(final, state)


@pytest.mark.slow
def test_bytes_of_a_token_and_head():
    """Distinct bytes; q, k, v, g and o have 1280. The system of a chunk takes k and g once more, and 256 for T."""
    tokens = 256
    q, k, v, beta, state, g = to(make(tokens, (128, 128), ("per channel", "mild")), torch.bfloat16)
    with count_traffic() as launches:
        gated_delta_rule(q, k, v, g, beta, initial_state=state, normalize_qk=True, backend="triton")
    assert [x.kernel for x in launches] == ["solve_chunks", "sweep_delta"]
    assert moved(launches, tokens) <= 1.63 * 1280


PER_SEQUENCE = {"first", "last", "dlast", "dfirst"}  # tensors that do not grow with the tokens


def moved(launches: list, tokens: int) -> float:
    """Return the distinct bytes of the launches per token, without those of states of a sequence."""
    return (
        sum(
            each.unique
            for launch in launches
            for kind in (launch.loads, launch.stores)
            for name, each in kind.items()
            if name not in PER_SEQUENCE
        )
        / tokens
    )
