"""Softmax attention in Triton against the fp64 reference: every option, shape and dtype, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.flash_attention import BlockMask, flash_attention
from hybridattn.kernels.flash_attention.triton import backward, forward, operands
from hybridattn.kernels.flash_attention.triton.launch import KERNELS, attention_launch
from hybridattn.workshop.interpreter_bf16 import reversed_programs
from hybridattn.workshop.traffic import count_traffic

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
    "scale of zero": {"scale": 0.0},
}


def make(
    queries: int, keys: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), batch: int = 1
) -> list[Tensor]:
    return [
        torch.randn(batch, tokens, h, dim).double()
        for tokens, h, dim in ((queries, heads[0], dims[0]), (keys, heads[1], dims[0]), (keys, heads[1], dims[1]))
    ]


def run(
    inputs: list[Tensor],
    backend: str,
    dtype: torch.dtype = torch.float64,
    rounding: torch.dtype | None = None,
    lost: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return results and gradients by name.

    The gradients of o and lse are the same numbers in every call. The gradient of o is rounded to ``rounding``; both
    are NaN from token ``lost`` on.
    """
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in zip("qkv", inputs, strict=True)}
    sinks = options.pop("sinks", None)
    if sinks is not None:
        wide = torch.promote_types(dtype, torch.float32)
        leaves["sinks"] = options["sinks"] = sinks.to(wide, copy=True).requires_grad_()
    o, lse = flash_attention(leaves["q"], leaves["k"], leaves["v"], return_lse=True, backend=backend, **options)
    do, dlse = (torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype) for x in (o, lse))
    if rounding is not None:
        do = do.to(rounding).to(o.dtype)
    if lost is not None:
        do[:, lost:], dlse[:, lost:] = torch.nan, torch.nan
    # The reference's lse has no gradient if there are no sequences.
    results, given = ([o, lse], [do, dlse]) if lse.requires_grad else ([o], [do])
    gradients = torch.autograd.grad(results, list(leaves.values()), given, materialize_grads=True)
    return {"o": o.detach(), "lse": lse.detach()} | dict(zip([f"d{x}" for x in leaves], gradients, strict=True))


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error over finite elements; both tensors have to be finite in the same places."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference = (actual[finite].double() - expected[finite]).norm()
    return (difference / expected[finite].norm()).item() if expected[finite].any() else difference.item()


def assert_exact(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert error(actual[name], x) <= (1e-4 if name.startswith("d") else 1e-5), name


@pytest.mark.parametrize(
    ("name", "lengths"),
    [pytest.param(name, (150, 150), marks=pytest.mark.slow) for name in OPTIONS]
    + [
        (name, lengths)
        for name in ("causal", "full", "window 20", "all")
        for lengths in ((1, 1), (7, 150), (50, 80), (150, 40), (0, 5), (5, 0))
    ],
)
def test_triton_equals_reference(name: str, lengths: tuple[int, int]):
    inputs = make(*lengths)
    expected, actual = (
        run(inputs, backend, dtype, **OPTIONS[name])
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert {x.dtype for x in actual.values()} == {torch.float32}
    assert_exact(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "dims"), [((1, 1), (5, 9)), *(((6, 2), dims) for dims in ((5, 9), (16, 80), (33, 20), (256, 1)))]
)
def test_any_dims_and_groups(heads: tuple[int, int], dims: tuple[int, int]):
    inputs = make(40, 50, heads, dims, batch=2)
    assert_exact(run(inputs, "triton", torch.float32), run(inputs, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in OPTIONS] + [(name, torch.float16) for name in ("causal", "all")],
)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(name: str, dtype: torch.dtype):
    inputs = make(150, 150, dims=(16, 16))
    truth = run(inputs, "reference", **OPTIONS[name])
    rounded = run([x.to(dtype).double() for x in inputs], "reference", rounding=dtype, **OPTIONS[name])
    actual = run(inputs, "triton", dtype, **OPTIONS[name])
    for name, x in truth.items():
        assert actual[name].dtype == (torch.float32 if name in ("lse", "dsinks") else dtype)
        limit = (2 if name.startswith("d") else 1.5) * error(rounded[name].to(actual[name].dtype), x)
        assert error(actual[name], x) <= limit, name


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 64, 200])
def test_block_masks(size: int):
    blocks = (-(-90 // size), -(-110 // size))
    for live in (torch.zeros(blocks).bool(), torch.rand(blocks) < 0.4, torch.ones(blocks).bool()):
        options = {"block_mask": BlockMask.from_dense(live, size), "window": 60}
        inputs = make(90, 110, heads=(2, 1))
        assert_exact(run(inputs, "triton", torch.float32, **options), run(inputs, "reference", **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lengths"),
    [("all", lengths) for lengths in ([], [0, 0], [130], [128, 2])]
    + [(name, [3, 0, 70, 1, 64]) for name in ("causal", "full", "window 20", "all")],
)
def test_packed_equals_one_by_one(name: str, lengths: list[int]):
    """Tokens past the last offset belong to no sequence and are NaN."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    used = int(ends[-1])
    inputs = make(used + 4, used + 4)
    expected = run(inputs, "reference", cu_seqlens_q=ends, **OPTIONS[name])
    for x in inputs:
        x[:, used:] = torch.nan
    actual = run(inputs, "triton", torch.float32, lost=used, cu_seqlens_q=ends, **OPTIONS[name])
    assert_exact(actual, expected)
    for name in ("o", "dq", "dk", "dv"):
        assert not actual[name][:, used:].any()


def test_packed_queries_and_keys_of_different_lengths():
    ends = {"cu_seqlens_q": torch.tensor([0, 5, 75, 75, 80]), "cu_seqlens_k": torch.tensor([0, 0, 100, 130, 137])}
    inputs = make(80, 137)
    expected, actual = (
        run(inputs, backend, dtype, **ends, **OPTIONS["all"])
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert_exact(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "all"])
def test_without_tensor_descriptors(name: str, monkeypatch: pytest.MonkeyPatch):
    """As on sm_80, the kernels read every tile by pointers."""
    monkeypatch.setattr(operands, "architecture", lambda device: "sm_80")
    operands._launch.cache_clear()
    inputs, ends = make(74, 74), torch.tensor([0, 3, 70])
    for given in ({}, {"cu_seqlens_q": ends}):
        expected = run(inputs, "reference", **given, **OPTIONS[name])
        assert_exact(run(inputs, "triton", torch.float32, **given, **OPTIONS[name]), expected)
    operands._launch.cache_clear()


def test_strided_inputs():
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(70, 70, batch=2)]
    inputs[2] = inputs[2][:, :, :1].expand(-1, -1, 2, -1)
    assert_exact(run(inputs, "triton", torch.float32), run(inputs, "reference"))


def test_expanded_gradients_and_unused_lse():
    leaves = [x.float().requires_grad_() for x in make(20, 20)]
    gradients = [
        torch.autograd.grad(flash_attention(*leaves, backend=backend).sum(), leaves)
        for backend in ("reference", "triton")
    ]
    for expected, actual in zip(*gradients, strict=True):
        assert error(actual, expected.double()) <= 1e-4


@pytest.mark.slow
def test_any_order_of_programs_gives_the_same_bits():
    inputs = make(150, 150)
    first = run(inputs, "triton", torch.bfloat16, **OPTIONS["all"])
    with reversed_programs():
        second = run(inputs, "triton", torch.bfloat16, **OPTIONS["all"])
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.slow
def test_tiles_out_of_reach_are_not_loaded():
    """The kernels load only tiles with a key of the window, store no scores, and store every gradient once."""
    tokens, window = 1024, 100
    q, k, v = (x.bfloat16().requires_grad_() for x in make(tokens, tokens, heads=(1, 1), dims=(16, 16)))
    with count_traffic() as launches:
        o = flash_attention(q, k, v, window=window, backend="triton")
        o.backward(torch.ones_like(o))
    forward, of_queries, of_keys = launches
    rows = {name: attention_launch(name, "sm_90", 16, 16, 16) for name in KERNELS}

    def most(own: int, other: int) -> float:
        """Tokens loaded per token by tiles of ``own``, in tiles of ``other``."""
        reach = -(-(own + window - 1) // other) + 1
        assert reach * other / own < 4
        return reach * other / own

    for moved, name in ((forward, "forward"), (of_queries, "query_gradients")):
        for x in ("k", "v"):
            assert moved.loads[x].total <= most(rows[name].block_m, rows[name].block_n) * k.nbytes
        assert moved.loads["q"].total == q.nbytes
    for x in ("q", "do"):
        row = rows["key_gradients"]
        assert of_keys.loads[x].total <= most(row.block_n, row.block_m) * q.nbytes
    assert of_keys.loads["k"].total == of_keys.loads["v"].total == of_queries.loads["do"].total == k.nbytes
    statistics = tokens * 4
    for moved, stores in (
        (forward, {"o": o.nbytes, "lse": statistics}),
        (of_queries, {"dq": q.nbytes, "shift": statistics, "delta": statistics}),
        (of_keys, {"dk": k.nbytes, "dv": v.nbytes}),
    ):
        assert {name: x.total for name, x in moved.stores.items()} == stores
    assert set(forward.loads) == {"q", "k", "v"}
    assert set(of_queries.loads) == {"q", "k", "v", "do", "o", "lse", "dlse"}
    assert set(of_keys.loads) == {"q", "k", "v", "do", "shift", "delta"}


@pytest.mark.slow
def test_opcheck():
    q, k, v = (x.float().requires_grad_() for x in make(5, 6))
    offsets, key_blocks, size = BlockMask.from_dense(torch.ones(2, 2).bool(), 3)
    sinks = SINKS.clone().requires_grad_()
    arguments = (q, k, v, 0.3, 2, 0, SLOPES, sinks, 1.5, offsets, key_blocks, size, None, None)
    torch.library.opcheck(forward.forward, arguments)
    with torch.no_grad():
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        o, lse = forward.forward(*arguments)
        gradients = torch.randn_like(o), torch.randn_like(lse)
        torch.library.opcheck(backward.backward, (*arguments, o, lse, *gradients))


@pytest.mark.slow
def test_compiles_in_one_graph():
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, window=4, backend="triton")

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [x.float().requires_grad_() for x in make_same(6)]
        results.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *results))


def make_same(tokens: int) -> list[Tensor]:
    torch.manual_seed(1)
    return make(tokens, tokens)


def test_unsupported_inputs_raise():
    inputs = make(5, 5)
    with pytest.raises(ValueError, match=r"q: expected float32, float16 or bfloat16, got torch.float64 \(with"):
        flash_attention(*inputs, backend="triton")
    with pytest.raises(ValueError, match=r"v: expected a dim of 1 to 256, got 257 \(with backend='triton'\)"):
        flash_attention(*(x.float() for x in make(5, 5, dims=(8, 257))), backend="triton")
    many = torch.zeros(2**15, 1, 2, 1)
    with pytest.raises(ValueError, match=r"q: expected at most 65535 heads times batch rows, got 65536 \(with"):
        flash_attention(many, many, many, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("turned", ["q", "k", "v", "do"])
@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 2, 3, 1)])
def test_operands_with_a_strided_last_dimension(turned: str, order: tuple[int, ...]):
    x = {name: torch.randn(1, 20, 2, 16) for name in ("q", "k", "v", "do")}
    back = [order.index(n) for n in range(4)]
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        y = {name: value.to(dtype) for name, value in x.items()}
        if backend == "triton":
            y[turned] = y[turned].permute(*order).contiguous().permute(*back)
        do = y.pop("do")
        leaves = [value.requires_grad_() for value in y.values()]
        o = flash_attention(*leaves, backend=backend)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
