"""Options of softmax attention and its log-sum-exp, against a dense formula that shares no code with the package."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridattn.kernels.flash_attention import BlockMask, blocked, flash_attention

BATCH, HEADS, QUERY_HEADS, KEY, VALUE = 2, 2, 4, 6, 5
SLOPES = torch.tensor([0.5, 0.02, 3.0, 0.0])
SINKS = torch.tensor([0.4, -1.0, 3.0, -torch.inf])


def block_mask(queries: int, keys: int, size: int = 16, live: float = 0.4) -> BlockMask:
    return BlockMask.from_dense(torch.rand(-(-queries // size), -(-keys // size)) < live, size)


OPTIONS = {
    "log-sum-exp alone": lambda queries, keys: {},
    "not causal": lambda queries, keys: {"causal": False},
    "window": lambda queries, keys: {"window": 20},
    "window (3, 0)": lambda queries, keys: {"window": (3, 0)},
    "window (20, 7), not causal": lambda queries, keys: {"window": (20, 7), "causal": False},
    "window (0, 90), not causal": lambda queries, keys: {"window": (0, 90), "causal": False},
    "ALiBi": lambda queries, keys: {"alibi_slopes": SLOPES},
    "ALiBi, not causal": lambda queries, keys: {"alibi_slopes": SLOPES, "causal": False},
    "softcap": lambda queries, keys: {"softcap": 0.7},
    "sinks": lambda queries, keys: {"sinks": SINKS},
    "block mask": lambda queries, keys: {"block_mask": block_mask(queries, keys)},
    "block mask, not causal": lambda queries, keys: {"block_mask": block_mask(queries, keys, 7), "causal": False},
    "block mask, large blocks": lambda queries, keys: {"block_mask": block_mask(queries, keys, 100, 0.7)},
    "everything": lambda queries, keys: {
        "causal": False,
        "window": (50, 9),
        "scale": -0.9,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "softcap": 2,
        "block_mask": block_mask(queries, keys, 8, 0.8),
    },
}
SHAPES = [(1, 1), (37, 37), (150, 150), (70, 131), (9, 5), (3, 0), (0, 4), (0, 0)]  # queries, keys


def sees(queries: int, keys: int, causal: bool = True, window: Any = None, mask: BlockMask | None = None) -> Tensor:
    """Boolean [queries, keys], one pair at a time."""
    left, right = (window - 1, 0) if isinstance(window, int) else window or (keys + queries, keys + queries)
    result = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        live = None
        if mask is not None:
            block = i // mask.block_size
            live = set(mask.key_blocks[int(mask.offsets[block]) : int(mask.offsets[block + 1])].tolist())
        for s in range(keys):
            ahead = s - (i + keys - queries)
            inside = -left <= ahead <= (0 if causal else right)
            result[i, s] = inside and (mask is None or live is None or s // mask.block_size in live)
    return result


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """o and lse by plain exponentials in fp64: scores of the tests are small."""
    (_, queries, heads, dim), keys = q.shape, k.shape[1]
    mask = sees(queries, keys, options.get("causal", True), options.get("window"), options.get("block_mask"))
    k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    scores = options.get("scale", dim**-0.5) * torch.einsum("bthd,bshd->bhts", q, k)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if "alibi_slopes" in options:
        ahead = torch.arange(keys) - (torch.arange(queries) + keys - queries)[:, None]
        scores = scores - options["alibi_slopes"].double()[:, None, None] * ahead.abs()
    weights = scores.exp() * mask
    total = weights.sum(-1) + (0 if sinks is None else sinks.exp()[:, None])
    nothing = total == 0
    o = torch.einsum("bhts,bshv->bthv", weights / total.masked_fill(nothing, 1)[..., None], v)
    return o, total.masked_fill(nothing, 1).log().masked_fill(nothing, -torch.inf).transpose(1, 2)


def make_inputs(queries: int, keys: int, query_heads: int = QUERY_HEADS) -> list[Tensor]:
    return [
        torch.randn(BATCH, queries, query_heads, KEY).double(),
        torch.randn(BATCH, keys, HEADS, KEY).double(),
        torch.randn(BATCH, keys, HEADS, VALUE).double(),
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error, the absolute one if ``expected`` is zero; infinities have to agree."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].double(), expected[~finite].double())
    distance, norm = (actual - expected)[finite].double().norm(), expected[finite].double().norm()
    return (distance / norm if norm > 0 else distance).item()


def derive(call: Any, inputs: list[Tensor], options: dict[str, Any], grads: list[Tensor], dtype: torch.dtype):
    """Return o, lse and the gradients of inputs and finite sinks; an lse of -inf has no weight in the loss."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    if "sinks" in options:
        leaves.append(options["sinks"].to(dtype, copy=True).requires_grad_())
        options = options | {"sinks": leaves[-1]}
    o, lse = call(*leaves[:3], **options)
    finite = lse.isfinite()
    loss = (
        (o * grads[0].to(dtype)).sum()
        + (lse * grads[1].to(dtype))[finite].sum()
        + sum(0 * x[x.isfinite()].sum() for x in leaves)
    )
    return o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def check(inputs: list[Tensor], options: dict[str, Any], backend: str, dtype: torch.dtype, tolerance: float) -> None:
    shape = inputs[0].shape[:3]
    grads = [torch.randn(*shape, VALUE).double(), torch.randn(shape).double()]
    expected = derive(dense, inputs, options, grads, torch.float64)
    actual = derive(
        lambda *x, **o: flash_attention(*x, return_lse=True, backend=backend, **o), inputs, options, grads, dtype
    )
    for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype
        assert error(x, y) <= (tolerance if n < 2 else 10 * tolerance)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_the_dense_formula(name: str, queries: int, keys: int):
    inputs, options = make_inputs(queries, keys), OPTIONS[name](queries, keys)
    check(inputs, options, "reference", torch.float64, 1e-12)
    check(inputs, options, "torch", torch.float64, 1e-12)
    check(inputs, options, "torch", torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sinks", "everything"])
def test_gradient_of_sinks_in_sixteen_bits(name: str, dtype: torch.dtype):
    """The gradient is exact for the rounded operands: it does not depend on the rounding of o."""
    inputs, options = [x.to(dtype) for x in make_inputs(150, 150)], OPTIONS[name](150, 150)
    grads = [torch.randn(BATCH, 150, QUERY_HEADS, VALUE).to(dtype), torch.randn(BATCH, 150, QUERY_HEADS)]

    def derived(backend: str, x: list[Tensor], wide: torch.dtype) -> Tensor:
        sinks = options["sinks"].to(wide, copy=True).requires_grad_()
        results = flash_attention(*x, return_lse=True, backend=backend, **(options | {"sinks": sinks}))
        finite = [y.masked_fill(y.isinf(), 0) for y in results]
        return torch.autograd.grad(finite, [sinks], [y.to(x.dtype) for x, y in zip(finite, grads, strict=True)])[0]

    expected = derived("reference", [x.double() for x in inputs], torch.float64)
    assert error(derived("torch", inputs, torch.float32), expected) <= 1e-5


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    queries=st.integers(0, 90),
    past=st.integers(-20, 70),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(0, 80), st.integers(0, 80)),
    extras=st.sets(st.sampled_from(["alibi_slopes", "sinks", "softcap", "block_mask"])),
    size=st.integers(1, 40),
)
def test_any_options_together(queries: int, past: int, causal: bool, window: Any, extras: set[str], size: int):
    keys = max(queries + past, 0)
    values = {
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "softcap": 1.5,
        "block_mask": block_mask(queries, keys, size),
    }
    options = {name: values[name] for name in sorted(extras)} | {"causal": causal}
    if window is not None:
        options["window"] = (window[0], 0) if causal else window
    check(make_inputs(queries, keys), options, "torch", torch.float64, 1e-12)


@pytest.mark.parametrize("query_heads", [2, 6])
def test_gradcheck(query_heads: int):
    q, k, v = (x.requires_grad_() for x in make_inputs(9, 12, query_heads))
    sinks = torch.randn(query_heads).double().requires_grad_()
    options = {"softcap": 3.0, "alibi_slopes": torch.rand(query_heads), "block_mask": block_mask(9, 12, 4, 0.7)}
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: flash_attention(q, k, v, sinks=sinks, return_lse=True, **options),
        (q, k, v, sinks),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_queries_that_attend_to_no_key(backend: str):
    """o is 0 and lse is -inf, or the sink; gradients are 0, not NaN."""
    q, k, v = (x.requires_grad_() for x in make_inputs(40, 32))
    none = BlockMask(torch.tensor([0, 0, 1, 1]), torch.tensor([0]), 16)  # query blocks 0 and 2 see nothing
    o, lse = flash_attention(q, k, v, block_mask=none, return_lse=True, backend=backend)
    empty = torch.ones(40).bool()
    empty[16:32] = False
    assert not o[:, empty].any()
    assert (lse[:, empty] == -torch.inf).all()
    assert lse[:, ~empty].isfinite().all()
    weight = torch.randn_like(lse)
    (o.sum() + (lse.masked_fill(lse.isinf(), 0) * weight).sum()).backward()
    assert q.grad is not None
    assert not q.grad[:, empty].any()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    sinks = torch.randn(QUERY_HEADS).double().requires_grad_()
    o, lse = flash_attention(q, k, v, block_mask=none, sinks=sinks, return_lse=True, backend=backend)
    assert not o[:, empty].any()
    torch.testing.assert_close(lse[:, empty], sinks.expand(BATCH, 24, -1))
    (grad,) = torch.autograd.grad(lse[:, empty].sum(), sinks)
    torch.testing.assert_close(grad, torch.full_like(grad, 24 * BATCH))


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_all_blocks_is_none(causal: bool):
    inputs = make_inputs(70, 90)
    everything = BlockMask.from_dense(torch.ones(5, 6).bool(), 16)
    o = flash_attention(*inputs, causal=causal, block_mask=everything)
    assert error(o, flash_attention(*inputs, causal=causal)) <= 1e-12
    assert everything.to_dense(70, 90).all()


def test_masked_blocks_are_not_visited():
    """Keys that no query attends to may be NaN, and get no gradient."""
    q, k, v = make_inputs(96, 96)
    live = torch.rand(6, 6) < 0.5
    live[:, 2] = live[:, 5] = False
    dead = live.any(0).logical_not().repeat_interleave(16)
    k[:, dead], v[:, dead] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves, causal=False, block_mask=BlockMask.from_dense(live, 16))
    o.sum().backward()
    assert o.isfinite().all()
    for x in leaves:
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert dead.sum() >= 32
    assert not leaves[1].grad[:, dead].any()  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("window", [(63, 0), (64, 64), (0, 500)])
def test_tiles_outside_the_window_are_not_visited(window: tuple[int, int]):
    tokens, width = 5000, sum(window) + 1
    options = blocked.Options(1.0, *window)
    visited = sum(
        (t.stop - t.start) * (s.stop - s.start)
        for t, tiles in blocked._plan(tokens, tokens, 4, options)
        for s, _ in tiles
    )
    assert visited <= 2.1 * tokens * max(width, 64)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor created inside the block."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(
    "options",
    [
        {"window": 64},
        {"window": (50, 14), "causal": False},
        {"return_lse": True},
        {"softcap": 5.0, "alibi_slopes": torch.ones(1), "sinks": torch.ones(1)},
    ],
)
def test_no_tensor_of_all_scores(options: dict[str, Any]):
    """The largest tensor of a long row is far from T x T, forward and backward."""
    tokens = 4096
    q = torch.randn(1, tokens, 1, 4, requires_grad=True)
    with Largest() as largest:
        o = flash_attention(q, q, q, **options)
        (o[0].sum() + o[1].sum() if "return_lse" in options else o.sum()).backward()
    assert largest.elements <= 4 * tokens * 64 == tokens * tokens / 16


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_parts_of_the_keys_combine(backend: str):
    """Only one part gets the sink. Queries without keys in a part are weighted with exp(-inf) = 0."""
    q, k, v = make_inputs(50, 50)
    sinks, cut = torch.randn(QUERY_HEADS).double(), 31
    whole, whole_lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    first, first_lse = flash_attention(q[:, :cut], k[:, :cut], v[:, :cut], return_lse=True, backend=backend)
    late, late_lse = flash_attention(q[:, cut:], k[:, :cut], v[:, :cut], causal=False, return_lse=True, backend=backend)
    one, one_lse = torch.cat((first, late), 1), torch.cat((first_lse, late_lse), 1)
    two, two_lse = flash_attention(q, k[:, cut:], v[:, cut:], sinks=sinks, return_lse=True, backend=backend)
    lse = torch.logaddexp(one_lse, two_lse)
    merged = (one_lse - lse).exp()[..., None] * one + (two_lse - lse).exp()[..., None] * two
    assert error(lse, whole_lse) <= 1e-12
    assert error(merged, whole) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_log_sum_exp(backend: str):
    q, k, v = (x[:1] for x in make_inputs(23, 23))
    o, lse = flash_attention(
        q, k, v, cu_seqlens_q=torch.tensor([0, 9, 20]), sinks=SINKS, return_lse=True, backend=backend
    )
    for a, b in ((0, 9), (9, 20)):
        expected = flash_attention(q[:, a:b], k[:, a:b], v[:, a:b], sinks=SINKS, return_lse=True, backend="reference")
        assert error(o[:, a:b], expected[0]) <= 1e-12
        assert error(lse[:, a:b], expected[1]) <= 1e-12
    assert not o[:, 20:].any()
    assert (lse[:, 20:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_wide(dtype: torch.dtype):
    inputs = make_inputs(100, 100)
    o, lse = flash_attention(*(x.to(dtype) for x in inputs), sinks=SINKS.to(dtype), return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    rounded = flash_attention(*(x.to(dtype).double() for x in inputs), sinks=SINKS.to(dtype), return_lse=True)
    assert error(lse, rounded[1]) <= 1e-5
    with torch.autocast("cpu", dtype):
        o, lse = flash_attention(*(x.float() for x in inputs), sinks=SINKS.to(dtype), return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert error(lse, rounded[1]) <= 1e-5


@pytest.mark.parametrize("slope", [1e-3, 1.0, 50.0, 1e30])
def test_steep_slopes(slope: float):
    """Weights near or below the smallest normal number become 0: a CPU is slow on subnormal numbers."""
    inputs = make_inputs(200, 200)
    slopes = torch.full((QUERY_HEADS,), slope)
    expected = flash_attention(*inputs, alibi_slopes=slopes, backend="reference")
    assert error(flash_attention(*inputs, alibi_slopes=slopes), expected) <= 1e-12
    assert error(flash_attention(*(x.float() for x in inputs), alibi_slopes=slopes), expected) <= 1e-5


@pytest.mark.parametrize(("queries", "keys"), [(2, 10), (66, 90), (130, 140)])
@pytest.mark.parametrize("left", [3, 7, 65])
def test_two_queries_in_the_last_block(queries: int, keys: int, left: int):
    """The first key that some query of the block attends to is one before the first key that both attend to."""
    inputs, options = make_inputs(queries, keys), {"causal": False, "window": (left, 3)}
    expected = flash_attention(*inputs, **options, backend="reference")
    assert error(flash_attention(*inputs, **options), expected) <= 1e-12


def test_many_small_weights_add_up_to_a_large_sum():
    q, k = torch.ones(1, 1, 1, 1), torch.full((1, 1 << 16, 1, 1), -18.0)
    k[:, 0] = 0
    o, lse = flash_attention(q, k, k, scale=1.0, return_lse=True)
    expected = flash_attention(q.double(), k.double(), k.double(), scale=1.0, return_lse=True, backend="reference")
    assert error(o, expected[0]) <= 1e-5
    assert error(lse.exp(), expected[1].exp()) <= 1e-5


def test_large_scores():
    """The maximum is subtracted before any exponential."""
    inputs = [30 * x for x in make_inputs(150, 150)]
    o, lse = flash_attention(*inputs, return_lse=True)
    expected = flash_attention(*inputs, return_lse=True, backend="reference")
    assert error(o, expected[0]) <= 1e-12
    assert error(lse, expected[1]) <= 1e-12


def test_double_backward_raises():
    q, k, v = (x.requires_grad_() for x in make_inputs(9, 9))
    o, lse = flash_attention(q, k, v, return_lse=True, backend="torch")
    (grad,) = torch.autograd.grad(o.square().sum() + lse.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 9, 9), (2, 0, 9), (2, 9, 0), (2, 0, 0)])
def test_empty_inputs(shape: tuple[int, int, int]):
    batch, queries, keys = shape
    q, k, v = (x[:batch].clone().requires_grad_() for x in make_inputs(queries, keys))
    sinks = SINKS.clone().requires_grad_()
    o, lse = flash_attention(q, k, v, causal=False, window=(3, 3), sinks=sinks, return_lse=True)
    assert o.shape == (batch, queries, QUERY_HEADS, VALUE)
    assert lse.shape == (batch, queries, QUERY_HEADS)
    o.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v, sinks))


WRONG = torch.tensor([0, 1])
BAD = {
    "pair, causal": ({"window": (3, 1)}, r"window: expected a pair \(left, 0\) with causal=True, got \(3, 1\)"),
    "pair, negative": ({"window": (-1, 0)}, r"window: expected a positive integer, a pair .* got \(-1, 0\)"),
    "pair, of three": ({"window": (1, 2, 3)}, "window: expected a positive integer, a pair"),
    "scale": ({"scale": float("nan")}, "scale: expected a finite number or None, got nan"),
    "scale, a tensor": ({"scale": torch.ones(())}, "scale: expected a finite number or None"),
    "softcap": ({"softcap": 0}, "softcap: expected a finite positive number or None, got 0"),
    "slopes, shape": ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes: expected shape \[Hq=4\], got \[3\]"),
    "slopes, dtype": ({"alibi_slopes": torch.ones(4).long()}, "alibi_slopes: expected a floating-point dtype"),
    "slopes, gradient": (
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        "alibi_slopes: expected a tensor without gradients",
    ),
    "sinks, shape": ({"sinks": torch.ones(1, 4)}, r"sinks: expected shape \[Hq=4\], got \[1, 4\]"),
    "sinks, device": ({"sinks": torch.ones(4, device="meta")}, "sinks: expected device cpu"),
    "mask, type": ({"block_mask": torch.ones(9, 9)}, "block_mask: expected a BlockMask or None, got Tensor"),
    "mask, size": ({"block_mask": BlockMask(WRONG, WRONG, 0)}, "block_mask: expected a positive integer block_size"),
    "mask, dtype": ({"block_mask": BlockMask(WRONG.float(), WRONG, 9)}, "block_mask: expected offsets of int32 or"),
    "mask, list": ({"block_mask": BlockMask([0, 1], WRONG, 9)}, "block_mask: .* got list"),  # pyright: ignore
    "mask, rows": (
        {"block_mask": BlockMask(WRONG, WRONG, 4)},
        "block_mask: expected 4 offsets for 9 queries in blocks",
    ),
    "mask, offsets": ({"block_mask": BlockMask(WRONG, WRONG, 9)}, "block_mask: expected ascending offsets from 0 to 2"),
    "mask, blocks": (
        {"block_mask": BlockMask(WRONG, WRONG[1:], 9)},
        r"block_mask: expected key_blocks from 0 to 0, ascending within each query block, got \[1\]",
    ),
    "mask, order": (
        {"block_mask": BlockMask(torch.tensor([0, 1, 3]), torch.tensor([1, 1, 0]), 5)},
        "block_mask: expected key_blocks from 0 to 1, ascending",
    ),
    "mask, a block twice": (
        {"block_mask": BlockMask(torch.tensor([0, 2, 3]), torch.tensor([0, 0, 1]), 5)},
        "block_mask: expected key_blocks from 0 to 1, ascending",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name: str):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        flash_attention(*make_inputs(9, 9), **options)


def test_a_block_mask_is_not_for_packed_rows():
    q, k, v = (x[:1] for x in make_inputs(9, 9))
    with pytest.raises(ValueError, match="block_mask: expected None with cu_seqlens_q"):
        flash_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 9]), block_mask=block_mask(9, 9))
