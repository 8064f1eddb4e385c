"""Decoding against caches: ragged lengths, ring buffers, several new tokens, options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.flash_attention import flash_attention, flash_decode

HEADS, QUERY_HEADS, KEY, VALUE = 2, 6, 8, 5
SLOPES = torch.tensor([0.5, 0.02, 3.0, 0.0, 1.0, 0.1])
SINKS = torch.tensor([0.4, -1.0, 3.0, -torch.inf, 0.0, 1.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "log-sum-exp": {"return_lse": True},
    "window": {"window": 5},
    "window (4, 0)": {"window": (4, 0), "scale": 0.3, "return_lse": True},
    "ALiBi": {"alibi_slopes": SLOPES},
    "softcap and sinks": {"softcap": 1.5, "sinks": SINKS, "return_lse": True},
    "everything": {"window": 9, "alibi_slopes": SLOPES, "softcap": 1.5, "sinks": SINKS, "return_lse": True},
}


def histories(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every position of every row."""
    return [(torch.randn(n, HEADS, KEY).double(), torch.randn(n, HEADS, VALUE).double()) for n in lengths]


def caches(rows: list[tuple[Tensor, Tensor]], slots: int) -> tuple[Tensor, Tensor]:
    """Write position p to slot p % slots, in order; unwritten slots hold the largest number."""
    k = torch.full((len(rows), slots, HEADS, KEY), 1e6).double()
    v = torch.full((len(rows), slots, HEADS, VALUE), 1e6).double()
    for b, (keys, values) in enumerate(rows):
        for p in range(len(keys)):
            k[b, p % slots], v[b, p % slots] = keys[p], values[p]
    return k, v


def expected(q: Tensor, rows: list[tuple[Tensor, Tensor]], slots: int, starts: list[int], options: dict[str, Any]):
    """Run ``flash_attention`` over the positions that every row's cache holds, in order."""
    results = []
    for b, (k, v) in enumerate(rows):
        kept = slice(min(max(len(k) - slots, starts[b]), len(k)), None)
        results.append(flash_attention(q[b, None], k[None, kept], v[None, kept], backend="reference", **options))
    if "return_lse" in options:
        return [torch.cat(x) for x in zip(*results, strict=True)]
    return [torch.cat(results)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("starts", [None, [0, 4, 1, 2, 9]])
@pytest.mark.parametrize("new", [1, 3, 16])
@pytest.mark.parametrize(("slots", "lengths"), [(24, [5, 24, 1, 17, 0]), (24, [25, 100, 24, 3, 48])])
@pytest.mark.parametrize("name", OPTIONS)
def test_decode_equals_attention_over_the_cached_positions(
    name: str, slots: int, lengths: list[int], new: int, starts: list[int] | None, backend: str
):
    rows, options = histories(lengths), OPTIONS[name]
    q, (k, v) = torch.randn(len(rows), new, QUERY_HEADS, KEY).double(), caches(rows, slots)
    reference = expected(q, rows, slots, starts or [0] * len(rows), options)
    first = None if starts is None else torch.tensor(starts)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        wide = (x.to(dtype) for x in (q, k, v))
        actual = flash_decode(
            *wide, cache_lengths=torch.tensor(lengths), start_positions=first, backend=backend, **options
        )
        for x, y in zip(actual if "return_lse" in options else [actual], reference, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}])
def test_one_token_is_independent_of_the_order_of_a_full_cache(options: dict[str, Any]):
    """So the length of a full ring buffer may also be given as its number of slots."""
    rows = histories([40, 31])
    q, (k, v) = torch.randn(2, 1, QUERY_HEADS, KEY).double(), caches(rows, 24)
    one, two = (
        flash_decode(q, k, v, cache_lengths=torch.tensor(n, dtype=torch.int32), **options) for n in ([40, 31], [24, 24])
    )
    torch.testing.assert_close(one, two)


def test_token_by_token_equals_one_call():
    q, (k, v) = torch.randn(1, 12, QUERY_HEADS, KEY).double(), histories([12])[0]
    options: dict[str, Any] = {"window": 5, "sinks": SINKS, "alibi_slopes": SLOPES}
    parts = []
    for first, last in ((0, 1), (1, 4), (4, 10), (10, 12)):
        kept = caches([(k[:last], v[:last])], 10)
        parts.append(flash_decode(q[:, first:last], *kept, cache_lengths=torch.tensor([last]), **options))
    torch.testing.assert_close(torch.cat(parts, 1), flash_attention(q, k[None], v[None], **options))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_decode_is_differentiable(name: str):
    options = OPTIONS[name] | {"return_lse": False}
    q, (k, v) = torch.randn(2, 3, QUERY_HEADS, KEY).double(), caches(histories([11, 30]), 24)
    k, v = k.clamp(max=9), v.clamp(max=9)
    grads = []
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = flash_decode(*leaves, cache_lengths=torch.tensor([11, 30]), backend=backend, **options)
        grads.append(torch.autograd.grad(o.square().sum(), leaves))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_rows_and_no_slots(backend: str):
    q, k, v = torch.randn(2, 3, QUERY_HEADS, KEY), torch.randn(2, 0, HEADS, KEY), torch.randn(2, 0, HEADS, VALUE)
    o, lse = flash_decode(q, k, v, cache_lengths=torch.tensor([0, 0]), return_lse=True, backend=backend)
    assert o.shape == (2, 3, QUERY_HEADS, VALUE)
    assert not o.any()
    assert (lse == -torch.inf).all()
    o = flash_decode(q[:0], k[:0], v[:0], cache_lengths=torch.zeros(0).long(), backend=backend)
    assert o.shape == (0, 3, QUERY_HEADS, VALUE)
    assert not flash_decode(q, k, v, cache_lengths=torch.tensor([0, 0]), backend=backend).any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_the_output_has_the_dtype_of_the_queries(options: dict[str, Any], backend: str):
    """For caches of any dtype."""
    q, k = torch.randn(2, 1, QUERY_HEADS, KEY).bfloat16(), torch.randn(2, 10, HEADS, KEY)
    o = flash_decode(q, k, k, cache_lengths=torch.tensor([9, 9]), backend=backend, **options)
    assert o.dtype == torch.bfloat16


LENGTHS = torch.tensor([9, 9])
BAD = {
    "no token": (0, {}, "q: expected 1 to 16 new tokens, got 0"),
    "many tokens": (17, {}, "q: expected 1 to 16 new tokens, got 17"),
    "lengths, shape": (1, {"cache_lengths": torch.tensor([9])}, r"cache_lengths: expected shape \[B=2\], got \[1\]"),
    "lengths, dtype": (1, {"cache_lengths": LENGTHS.float()}, "cache_lengths: expected int32 or int64, got"),
    "lengths, device": (1, {"cache_lengths": LENGTHS.to("meta")}, "cache_lengths: expected device cpu"),
    "lengths, value": (1, {"cache_lengths": -LENGTHS}, r"cache_lengths: expected integers >= 0, got \[-9, -9\]"),
    "lengths, none": (1, {"cache_lengths": None}, r"cache_lengths: expected a tensor \[B\], got NoneType"),
    "starts": (1, {"start_positions": LENGTHS[:1]}, r"start_positions: expected shape \[B=2\], got \[1\]"),
    "window": (1, {"window": (3, 1)}, r"window: expected a pair \(left, 0\)"),
    "short ring": (
        3,
        {"window": 9, "cache_lengths": torch.tensor([9, 12])},
        r"k_cache: expected a ring buffer of at least 11 slots \(window \+ new tokens - 1\), got 10",
    ),
    "slopes": (1, {"alibi_slopes": SLOPES[:2]}, r"alibi_slopes: expected shape \[Hq=6\], got \[2\]"),
    "sinks": (1, {"sinks": SINKS[:2]}, r"sinks: expected shape \[Hq=6\], got \[2\]"),
    "softcap": (1, {"softcap": -1.0}, "softcap: expected a finite positive number or None, got -1.0"),
    "backend": (1, {"backend": "cuda"}, "backend: expected one of"),
    "backend on a CPU": (1, {"backend": "triton"}, "q: expected a CUDA tensor with backend='triton'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str):
    new, options, message = BAD[name]
    q, k, v = (torch.randn(2, n, h, KEY) for n, h in ((new, QUERY_HEADS), (10, HEADS), (10, HEADS)))
    with pytest.raises(ValueError, match=message):
        flash_decode(q, k, v, **({"cache_lengths": LENGTHS} | options))
