"""Softmax attention in Triton against the fp64 reference: every option, shape and dtype, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.evals.kernels.triton.traffic import count_traffic
from hybridattn.kernels.flash_attention import BlockMask, flash_attention
from hybridattn.kernels.flash_attention.triton.launch import forward_launch

B = 2
SLOPES, SINKS = torch.tensor([0.5, 0.01, 4.0, 0.2]), torch.tensor([0.3, -torch.inf, 2.0, -1.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window 1": {"window": 1},
    "window 20": {"window": 20},
    "window 130": {"window": 130},
    "window (20, 5)": {"causal": False, "window": (20, 5)},
    "ALiBi": {"alibi_slopes": SLOPES},
    "ALiBi, to both sides": {"causal": False, "alibi_slopes": SLOPES},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS, "window": 20},
    "all": {"softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS, "causal": False, "window": (40, 70), "scale": 0.7},
    "negative scale": {"scale": -0.3},
}


def make(queries: int, keys: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8)) -> list[Tensor]:
    return [
        torch.randn(B, tokens, h, dim).double()
        for tokens, h, dim in ((queries, heads[0], dims[0]), (keys, heads[1], dims[0]), (keys, heads[1], dims[1]))
    ]


def run(
    inputs: list[Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    return flash_attention(*(x.to(dtype) for x in inputs), return_lse=True, backend=backend, **options)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 over what is finite, which has to be the same."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference = (actual[finite].double() - expected[finite]).norm()
    return (difference / expected[finite].norm()).item() if expected[finite].any() else difference.item()


@pytest.mark.parametrize("lengths", [(1, 1), (150, 150), (7, 150), (150, 40), (128, 256), (0, 5), (5, 0)])
@pytest.mark.parametrize("name", OPTIONS)
def test_triton_equals_reference(name: str, lengths: tuple[int, int]):
    inputs = make(*lengths)
    expected, actual = (
        run(inputs, backend, dtype, **OPTIONS[name])
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert [x.dtype for x in actual] == [torch.float32, torch.float32]
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize("dims", [(5, 9), (16, 80), (33, 20), (256, 1)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_any_dims_and_groups(heads: tuple[int, int], dims: tuple[int, int]):
    inputs = make(70, 90, heads, dims)
    expected, actual = run(inputs, "reference"), run(inputs, "triton", torch.float32)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(name: str, dtype: torch.dtype):
    inputs = make(150, 150, dims=(16, 16))
    truth = run(inputs, "reference", **OPTIONS[name])[0]
    rounded = run([x.to(dtype).double() for x in inputs], "reference", **OPTIONS[name])[0].to(dtype)
    actual = run(inputs, "triton", dtype, **OPTIONS[name])[0]
    assert actual.dtype == dtype
    assert error(actual, truth) <= 1.5 * error(rounded, truth)


@pytest.mark.parametrize("size", [24, 64, 200])
def test_block_masks(size: int):
    blocks = (-(-150 // size), -(-170 // size))
    for live in (torch.ones(blocks).bool(), torch.zeros(blocks).bool(), torch.rand(blocks) < 0.4):
        options = {"block_mask": BlockMask.from_dense(live, size), "window": 90}
        inputs = make(150, 170)
        expected, actual = run(inputs, "reference", **options), run(inputs, "triton", torch.float32, **options)
        assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize("lengths", [[], [0, 0], [130], [3, 0, 70, 1, 64], [128, 2]])
@pytest.mark.parametrize("name", ["causal", "full", "window 20", "all"])
def test_packed_equals_one_by_one(name: str, lengths: list[int]):
    """Also beside what is NaN: tokens past the last offset belong to no sequence."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = [x[:1] for x in make(sum(lengths) + 4, sum(lengths) + 4)]
    expected = run(inputs, "reference", cu_seqlens_q=ends, **OPTIONS[name])
    for x in inputs:
        x[:, ends[-1] :] = torch.nan
    actual = run(inputs, "triton", torch.float32, cu_seqlens_q=ends, **OPTIONS[name])
    assert max(map(error, actual, expected)) <= 1e-5
    assert not actual[0][:, ends[-1] :].any()


def test_strided_inputs():
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(70, 70)]
    inputs[2] = inputs[2][:, :, :1].expand(-1, -1, 2, -1)
    expected, actual = run(inputs, "reference"), run(inputs, "triton", torch.float32)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize("name", ["causal", "window 20", "all"])
def test_gradients(name: str):
    options = OPTIONS[name]
    weights = torch.randn(B, 70, 4, 8).double(), torch.randn(B, 70, 4).double()
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (*make_same(70), *([SINKS] if "sinks" in options else []))]
        given = {**options, "sinks": leaves[3]} if "sinks" in options else options
        o, lse = flash_attention(*leaves[:3], return_lse=True, backend=backend, **given)
        results.append(torch.autograd.grad((o * weights[0]).sum() + (lse * weights[1]).sum(), leaves))
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-4


def make_same(tokens: int) -> list[Tensor]:
    torch.manual_seed(1)
    return make(tokens, tokens)


def test_twice_gives_the_same_bits():
    inputs = make(150, 150)
    first, second = (run(inputs, "triton", torch.bfloat16, **OPTIONS["all"]) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_tiles_out_of_reach_are_not_loaded():
    """Nothing but the tiles that hold a key of the window, and no scores."""
    tokens, window = 1024, 100
    q, k, v = (x.bfloat16() for x in make(tokens, tokens, heads=(1, 1), dims=(16, 16)))
    with count_traffic() as launches:
        o = flash_attention(q, k, v, window=window, backend="triton")
    (moved,) = launches
    row = forward_launch("sm_90", 16, 16, 16)
    reach = -(-(row.block_m + window - 1) // row.block_n) + 1
    most = tokens // row.block_m * reach * row.block_n / tokens
    assert most < 4
    assert moved.loads["k"].total <= most * k.nbytes
    assert moved.loads["v"].total <= most * v.nbytes
    assert moved.loads["q"].total == q.nbytes
    assert moved.stores["o"].total == o.nbytes
    assert set(moved.loads) == {"q", "k", "v"}
    assert set(moved.stores) == {"o", "lse"}


def test_what_is_not_served_is_named():
    inputs = make(5, 5)
    with pytest.raises(ValueError, match=r"q: expected float32, float16 or bfloat16, got torch.float64 with backend="):
        run(inputs, "triton")
    with pytest.raises(ValueError, match=r"v: expected a dim of 1 to 256, got 257 with backend='triton'"):
        run(make(5, 5, dims=(8, 257)), "triton", torch.float32)
