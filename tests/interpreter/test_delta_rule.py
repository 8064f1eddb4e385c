"""The chunked gated delta rule in Triton against the fp64 reference: the laws of DESIGN.md, at small sizes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import gated_delta_rule
from hybridattn.kernels.linear_attention.triton import delta_op
from hybridattn.workshop.traffic import Launch, count_traffic

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


def with_gradients(x: list[Tensor], backend: str, grads: list[Tensor], normalize: bool = True, **options: Any):
    """Return outputs, final states and the gradients of all inputs."""
    leaves = [y.clone().requires_grad_() for y in x]
    results = run(leaves, backend, normalize, **options)
    pairs = [
        (y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if y.requires_grad
    ]  # no tokens: o does not
    given = torch.autograd.grad(
        [y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [y.detach() for y in results] + list(given)


def errors(x: list[Tensor], normalize: bool = True, **options: Any) -> float:
    """Return the largest error of results and gradients in fp32; gradients count a tenth, as in the first law."""
    grads = [torch.randn_like(y) for y in run(x, "reference", normalize, **options)]
    expected = with_gradients(x, "reference", grads, normalize, **options)
    actual = with_gradients(to(x, torch.float32), "triton", grads, normalize, **options)
    found = list(map(error, actual, expected))
    return max(*found[:2], max(found[2:]) / 10)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [pytest.param(case, 200, marks=pytest.mark.slow) for case in CASES]
    + [(case, tokens) for case in (CASES[1], CASES[6], CASES[-1]) for tokens in (0, 1, 7, 64, 65)],
)
def test_triton_equals_reference(case: tuple[str, str], tokens: int):
    assert errors(make(tokens, case=case)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dims", DIMS)
def test_dims(dims: tuple[int, int]):
    assert errors(make(70, dims)) <= 1e-5


def test_keys_that_are_normal_already():
    x = make(70)
    x[1] /= x[1].norm(dim=-1, keepdim=True)
    assert errors(x, normalize=False) <= 1e-5


def test_equal_keys():
    """The powers of diag(beta) L are far larger than the inverse of I + diag(beta) L."""
    x = make(70, case=("none", "none"))
    x[1], x[3] = x[1][:, :1].expand_as(x[1]), torch.full_like(x[3], 2.0)
    assert errors(x) <= 1e-5


@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads(heads: str):
    for gate_heads in sorted(set(HEADS[heads][1:])):
        assert errors(make(70, heads=HEADS[heads], gate_heads=gate_heads)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [("per channel", "resets"), ("per head", "hot")], ids=", ".join)
@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 70, 1, 64], [128, 2], [1, 65]])
def test_packed_equals_one_by_one(lengths: list[int], case: tuple[str, str]):
    x = make(sum(lengths) + 4, case=case, sequences=len(lengths))  # 4 tokens belong to no sequence
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert errors(x, cu_seqlens=ends) <= 1e-5
    assert not run(to(x, torch.float32), "triton", cu_seqlens=ends)[0][:, ends[-1] :].any()


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[1, 64, 65], [100]])
def test_any_split_with_the_state_carried_over(cuts: list[int]):
    x = to(make(150), torch.float32)
    q, k, v, beta, state, g = x
    o, final = run(x, "triton")
    parts = []
    for first, last in pairwise([0, *cuts, 150]):
        q_, k_, v_, beta_, g_ = (y[:, first:last] for y in (q, k, v, beta, g))
        part, state = run([q_, k_, v_, beta_, state, g_], "triton")
        parts.append(part)
    assert error(torch.cat(parts, 1), o) <= 1e-6
    assert error(state, final) <= 1e-6


def test_strided_inputs_and_mixed_dtypes():
    x = make(70, (24, 8), heads=HEADS["grouped queries"])
    plain = run(to(x, torch.float32), "triton")
    turned = [
        y.float().transpose(0, -1).contiguous().transpose(0, -1) if n != 4 else y.float() for n, y in enumerate(x)
    ]
    assert all(torch.equal(y, z) for y, z in zip(run(turned, "triton"), plain, strict=True))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float32)
    mixed = [y.to(dtype) for y, dtype in zip(x, dtypes, strict=True)]
    grads = [torch.randn_like(y) for y in plain]
    actual = with_gradients(mixed, "triton", grads)
    assert [y.dtype for y in actual[2:]] == list(dtypes)
    expected = with_gradients([y.double() for y in mixed], "reference", [grads[0].half(), grads[1]])
    assert max(map(error, actual, expected)) <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_sixteen_bit_errors_are_close_to_those_of_rounded_operands(case: tuple[str, str], dtype: torch.dtype):
    """The error of results is at most 1.5 times, of gradients (rounded themselves) twice that of rounding operands.

    An exception is fp16 with every channel hot: 2.04 times for the gradient of beta.
    """
    limit = 2.1 if dtype == torch.float16 and case == ("per channel", "hot") else 2
    x = make(200, (32, 24), case, (2, 2, 2))
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    exact, narrow = with_gradients(x, "reference", grads), to(x, dtype)
    rounded_grads = [grads[0].to(dtype).double(), grads[1].float().double()]
    formula = with_gradients(to(narrow, torch.float64), "reference", rounded_grads)
    actual = with_gradients(narrow, "triton", grads)
    assert [y.dtype for y in actual[:2]] == [dtype, torch.float32]
    for n, (result, truth, of_rounded) in enumerate(zip(actual, exact, formula, strict=True)):
        assert error(result, truth) <= (1.5 if n < 2 else limit) * error(of_rounded.to(result.dtype), truth) + 1e-6


@pytest.mark.parametrize("empty", [(0, 3, 1, 8, 5), (1, 3, 0, 8, 5), (1, 3, 1, 0, 5), (1, 3, 1, 8, 0)])
def test_empty_dimensions(empty: tuple[int, ...]):
    b, t, h, key_dim, value_dim = empty
    q, v = torch.randn(b, t, h, key_dim, requires_grad=True), torch.randn(b, t, h, value_dim)
    state = torch.randn(b, h, key_dim, value_dim)
    o, final = run([q, q, v, torch.rand(b, t, h), state], "triton", scale=1.0)
    assert torch.equal(o, torch.zeros(b, t, h, value_dim))
    assert torch.equal(final, state)
    (dq,) = torch.autograd.grad(o.sum() + final.sum(), [q])
    assert torch.equal(dq, torch.zeros_like(q))


@pytest.mark.slow
def test_opcheck():
    """Without the comparison of outputs: scores of hot channels stay unwritten where there are none."""
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k, v, beta, state, g = (y.requires_grad_() for y in to(make(3), torch.float32))
    for x in (
        (q, k, v, g, beta, 0.7, True, state, None),
        (q, k, v, None, beta, 0.7, False, None, torch.tensor([0, 1, 3])),
    ):
        torch.library.opcheck(delta_op.forward, x, test_utils=utilities)


def test_the_named_backend_runs_or_raises():
    q, *rest = to(make(3), torch.float32)
    with pytest.raises(ValueError, match=r"q: expected float32, .* got torch.float64 \(with backend='triton'\)"):
        run([q.double(), *rest], "triton")
    with pytest.raises(ValueError, match=r"initial_state: expected float32, got torch.float64"):
        run([q, *rest[:3], rest[3].double(), rest[4]], "triton")


PER_SEQUENCE = {"first", "last", "dlast", "dfirst"}  # tensors that do not grow with the tokens


@pytest.mark.slow
def test_bytes_of_a_token_and_head():
    """Distinct bytes; q, k, v, g and o have 1280, with gradients 2304.

    Forward, ``solve_chunks`` reads k and g once more, and M is written once and read once (256). Backward, the states
    before all chunks and the gradients of those after all chunks are written once and read once (2048), r and dv are
    scratch too, and every kernel reads k and g.
    """
    tokens = 256
    q, k, v, beta, state, g = to(make(tokens, (128, 128), ("per channel", "mild")), torch.bfloat16)
    leaves = [y.requires_grad_() for y in (q, k, v, g, beta)]
    q, k, v, g, beta = leaves
    with count_traffic() as launches:
        o, _ = gated_delta_rule(q, k, v, g, beta, initial_state=state, normalize_qk=True, backend="triton")
        o.backward(torch.randn_like(o))
    names = ["solve_chunks", "sweep_delta", "sweep_delta", "sweep_gradients", "delta_gradients"]
    assert [launch.kernel for launch in launches] == names
    assert moved(launches[:2], tokens) <= 1.63 * 1280
    assert moved(launches[2:], tokens) <= 3.14 * 2304


def moved(launches: list[Launch], tokens: int) -> float:
    """Return the distinct bytes of the launches per token, without those of states of a sequence."""
    kinds = [kind for launch in launches for kind in (launch.loads, launch.stores)]
    return sum(each.unique for kind in kinds for name, each in kind.items() if name not in PER_SEQUENCE) / tokens
