"""BASED's and JRT's linear attention in Triton against the fp64 reference, forward and backward."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import features, prefix_linear_attention, taylor_linear_attention
from hybridattn.kernels.linear_attention.triton import op
from hybridattn.workshop.traffic import count_traffic

HEADS = {"one each": (2, 2, 2), "grouped queries": (4, 2, 2), "grouped values": (1, 1, 2)}  # of q, k, v


def make(tokens: int, dims: tuple[int, int] = (4, 8), heads: tuple[int, int, int] = (1, 1, 1)) -> list[Tensor]:
    """Return q, k, v and an initial NormalizedState, in fp64; the sums of keys, which are divisors, are positive."""
    (dim, value_dim), rows = dims, features.count(dims[0])
    q, k, v = (torch.randn(1, tokens, h, d) for h, d in zip(heads, (dim, dim, value_dim), strict=True))
    state, sums = torch.randn(1, max(heads[1:]), rows, value_dim), torch.zeros(1, max(heads[1:]), rows)
    sums[..., 0] = 3
    return [x.double() for x in (q, k, v, state, sums)]


def run(x: list[Tensor], backend: str, normalize: bool = True, **options: Any) -> list[Tensor]:
    q, k, v, state, sums = x
    initial = (state, sums) if normalize else state
    o, final = taylor_linear_attention(
        q,
        k,
        v,
        normalize=normalize,
        initial_state=initial,  # pyright: ignore[reportArgumentType]
        output_final_state=True,
        backend=backend,
        **options,
    )
    return [o, *final] if normalize else [o, final]  # pyright: ignore[reportReturnType, reportOptionalIterable]


def with_gradients(x: list[Tensor], backend: str, grads: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [y.clone().requires_grad_() for y in x]
    results = run(leaves, backend, **options)
    pairs = [(y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if y.requires_grad]
    given = torch.autograd.grad(
        [y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [y.detach() for y in results] + list(given)


def to(x: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [y.to(dtype if n < 3 else torch.promote_types(dtype, torch.float32)) for n, y in enumerate(x)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; the absolute one if ``expected`` is zero."""
    assert actual.shape == expected.shape
    norm, distance = expected.double().norm(), (actual.double() - expected.double()).norm()
    return (distance / norm if norm > 0 else distance).item()


def compare(x: list[Tensor], **options: Any) -> None:
    grads = [torch.randn_like(y) for y in run(x, "reference", **options)]
    expected = with_gradients(x, "reference", grads, **options)
    actual = with_gradients(to(x, torch.float32), "triton", grads, **options)
    assert [y.dtype for y in actual] == [torch.float32] * len(actual)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize(
    ("tokens", "normalize"),
    [*((tokens, True) for tokens in (0, 1, 7, 64, 65, 150)), (0, False), (7, False), (65, False)],
)
def test_triton_equals_reference(tokens: int, normalize: bool):
    compare(make(tokens), normalize=normalize)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(1, 5), (8, 8), (16, 70)])
def test_dims(dims: tuple[int, int]):
    compare(make(70, dims), scale=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads(heads: str):
    compare(make(70, (4, 8), HEADS[heads]))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[], [3, 0, 70, 1, 64]])
def test_packed_equals_one_by_one(lengths: list[int]):
    q, k, v, state, sums = make(sum(lengths) + 4)
    x = [q, k, v, *(y.repeat(len(lengths), *[1] * (y.dim() - 1)) for y in (state, sums))]
    compare(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [5])
def test_segments_of_a_sequence(parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op, "segments", lambda *_: parts)
    compare(make(200, heads=HEADS["grouped queries"]))


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[64], [1, 65]])
def test_any_split_with_the_state_carried_over(cuts: list[int]):
    q, k, v, state, sums = to(make(130), torch.float32)
    whole, parts, carried = run([q, k, v, state, sums], "triton"), [], [state, sums]
    for first, last in pairwise([0, *cuts, 130]):
        o, *carried = run([*(y[:, first:last] for y in (q, k, v)), *carried], "triton")
        parts.append(o)
    assert max(map(error, [torch.cat(parts, 1), *carried], whole)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("normalize", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_sixteen_bit_errors_are_close_to_those_of_rounded_operands(normalize: bool, dtype: torch.dtype):
    x = make(150, (16, 24))
    grads = [torch.randn_like(y) for y in run(x, "reference", normalize)]
    exact = with_gradients(x, "reference", grads, normalize=normalize)
    actual = with_gradients(to(x, dtype), "triton", grads, normalize=normalize)
    of_rounded = to(to(x, dtype), torch.float64)
    formula = with_gradients(of_rounded, "reference", [grads[0].to(dtype), *grads[1:]], normalize=normalize)
    results = 3 if normalize else 2
    for n, (result, of_formula, truth) in enumerate(zip(actual, formula, exact, strict=True)):
        limit = 1.5 if n < results else 2.0
        assert error(result, truth) <= limit * error(of_formula.to(result.dtype), truth)


def test_a_prefix_is_one_more_sequence_of_keys():
    q, k, v, *_ = make(70, (4, 8), (2, 2, 2))
    x = [q, k, v, k[:, :40].flip(1), v[:, :40].flip(1)]
    lengths, results = torch.tensor([30]), []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [y.to(dtype).requires_grad_() for y in x]
        o, _ = prefix_linear_attention(*leaves, prefix_lengths=lengths, backend=backend)
        results.append([o.detach(), *torch.autograd.grad(o.square().sum(), leaves)])
    assert max(map(error, results[1], results[0])) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prefix_in_sixteen_bits(dtype: torch.dtype):
    """Within 1.5 times the error of rounding operands, gradients within twice."""
    q, k, v, *_ = make(150, (8, 16), (2, 2, 2))
    x = [q, k, v, k[:, :90].flip(1), v[:, :90].flip(1)]
    lengths, do, results = torch.tensor([77]), torch.randn_like(v), []
    for backend, rounded in (("reference", False), ("reference", True), ("triton", True)):
        leaves = [(y.to(dtype) if rounded else y) for y in x]
        leaves = [(y if backend == "triton" else y.double()).requires_grad_() for y in leaves]
        o, _ = prefix_linear_attention(*leaves, prefix_lengths=lengths, backend=backend)
        gradients = torch.autograd.grad(o, leaves, (do.to(dtype) if rounded else do).to(o.dtype))
        results.append([y.detach() if not rounded else y.detach().to(dtype) for y in (o, *gradients)])
    for n, (truth, of_rounded, actual) in enumerate(zip(*results, strict=True)):
        assert error(actual, truth) <= (2 if n else 1.5) * error(of_rounded, truth)


@pytest.mark.parametrize("grouped", [(4, 2, 2), (2, 2, 4)])
def test_a_prefix_of_shared_heads(grouped: tuple[int, int, int]):
    q, k, v, *_ = make(20, (4, 8), grouped)
    x = [q, k, v, k[:, :9].flip(1), v[:, :9].flip(1)]
    (exact, state), (actual, after) = (
        prefix_linear_attention(*(y.to(dtype) for y in x), output_final_state=True, backend=backend)
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert max(map(error, (actual, *after), (exact, *state))) <= 1e-5


@pytest.mark.slow
def test_features_are_never_in_memory():
    """A launch reads and writes q, k, v and o once per token and head, and no features (153 per vector)."""
    tokens, (dim, value_dim) = 256, (16, 64)
    x = to(make(tokens, (dim, value_dim)), torch.bfloat16)
    with count_traffic() as launches:
        run(x, "triton", normalize=False)
    (launch,) = launches
    assert {name: moved.unique for name, moved in launch.loads.items() if name in "awu"} == {
        "a": x[0].nbytes,
        "w": x[1].nbytes,
        "u": x[2].nbytes,
    }
    assert launch.stores["y"].unique == x[2].nbytes
    assert set(launch.stores) == {"y", "last"}


def test_too_many_features_raise():
    q = torch.randn(1, 3, 1, 22)
    with pytest.raises(ValueError, match=r"k: expected a key dim of at most 256, got 276 \(with backend='triton'\)"):
        taylor_linear_attention(q, q, q, backend="triton")
    taylor_linear_attention(q, q, q)  # without a name another backend runs
