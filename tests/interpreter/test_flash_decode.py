"""Decoding in Triton against the fp64 reference: ragged lengths, ring buffers, every option, any cut into shares."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from hybridattn.kernels.flash_attention import flash_decode
from hybridattn.kernels.flash_attention.triton import decode
from hybridattn.kernels.flash_attention.triton.launch import decode_launch
from hybridattn.workshop.interpreter_bf16 import reversed_programs
from hybridattn.workshop.traffic import count_traffic

SLOTS = 200
LENGTHS = {"ragged": [0, 1, 150, 63], "full": [200, 2, 0, 130], "rings": [201, 777, 199, 400], "empty": [0, 0, 0, 0]}
SLOPES, SINKS = torch.tensor([0.5, 0.01, 4.0, 0.2]), torch.tensor([0.3, -torch.inf, 2.0, -1.0])
STARTS = torch.tensor([0, 5, 120, 30])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window 1": {"window": 1},
    "window 20": {"window": 20},
    "window 130": {"window": 130},
    "ALiBi": {"alibi_slopes": SLOPES},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "starts": {"start_positions": STARTS},
    "all": {
        "window": 90,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "softcap": 2.0,
        "start_positions": STARTS,
        "scale": 0.7,
    },
    "negative scale": {"scale": -0.3},
}


def make(
    new: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), batch: int = 4, slots: int = SLOTS
) -> list[Tensor]:
    return [
        torch.randn(batch, tokens, h, dim).double()
        for tokens, h, dim in ((new, heads[0], dims[0]), (slots, heads[1], dims[0]), (slots, heads[1], dims[1]))
    ]


def run(
    inputs: list[Tensor], lengths: list[int], backend: str, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(dtype) for x in inputs)
    return flash_decode(q, k, v, cache_lengths=torch.tensor(lengths), return_lse=True, backend=backend, **options)


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error over finite elements; both tensors have to be finite in the same places."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference = (actual[finite].double() - expected[finite]).norm()
    return (difference / expected[finite].norm()).item() if expected[finite].any() else difference.item()


@pytest.mark.parametrize(
    ("name", "lengths", "new"),
    [(name, lengths, new) for name in OPTIONS for lengths, new in (("ragged", 3), ("rings", 1))]
    + [(name, lengths, new) for name in ("plain", "all") for lengths in ("full", "empty") for new in (1, 3)]
    + [("all", "rings", 3), ("all", "ragged", 1)],
)
def test_triton_equals_reference(name: str, lengths: str, new: int):
    inputs = make(new)
    expected = run(inputs, LENGTHS[lengths], "reference", **OPTIONS[name])
    actual = run(inputs, LENGTHS[lengths], "triton", torch.float32, **OPTIONS[name])
    assert max(map(error, actual, expected)) <= 1e-5


def test_first_positions_in_rings_that_wrapped():
    """The first positions are later than the oldest position in the buffer."""
    inputs, options = make(2), {"start_positions": torch.tensor([150, 760, 198, 210])}
    expected = run(inputs, LENGTHS["rings"], "reference", **options)
    actual = run(inputs, LENGTHS["rings"], "triton", torch.float32, **options)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "heads", "dims"),
    [(1, (1, 1), (5, 9)), (16, (6, 2), (33, 20)), (2, (40, 1), (16, 80)), (1, (4, 4), (256, 1))],
)
def test_any_dims_and_groups(new: int, heads: tuple[int, int], dims: tuple[int, int]):
    """Includes more queries than one tile holds."""
    inputs, lengths = make(new, heads, dims, batch=2, slots=70), [70, 41]
    expected, actual = run(inputs, lengths, "reference"), run(inputs, lengths, "triton", torch.float32)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in OPTIONS] + [(name, torch.float16) for name in ("plain", "all")],
)
def test_sixteen_bits_cost_no_more_than_rounding_the_operands(name: str, dtype: torch.dtype):
    inputs, lengths = make(3, dims=(16, 16)), LENGTHS["full"]
    truth = run(inputs, lengths, "reference", **OPTIONS[name])[0]
    rounded = run([x.to(dtype).double() for x in inputs], lengths, "reference", **OPTIONS[name])[0].to(dtype)
    actual = run(inputs, lengths, "triton", dtype, **OPTIONS[name])[0]
    assert actual.dtype == dtype
    assert error(actual, truth) <= 1.5 * error(rounded, truth)


def shares(
    inputs: list[Tensor], lengths: list[int], programs: int | None, left: int | None = None
) -> tuple[Tensor, Tensor]:
    """The op itself, with sinks."""
    q, k, v = (x.float() for x in inputs)
    return decode.attend(q, k, v, torch.tensor(lengths), None, 0.4, left, None, SINKS, None, programs)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ["ragged", "rings"])
def test_any_number_of_shares_gives_the_same_result(lengths: str):
    inputs = make(2)
    q, k, v = inputs
    whole = flash_decode(
        q, k, v, cache_lengths=torch.tensor(LENGTHS[lengths]), scale=0.4, sinks=SINKS, return_lse=True,
        backend="reference",
    )  # fmt: skip
    for programs in (None, 1, 3, 13, 40):
        assert max(map(error, shares(inputs, LENGTHS[lengths], programs), whole)) <= 1e-6


def test_the_same_bits_in_any_order_of_programs():
    inputs = make(2)
    first = shares(inputs, LENGTHS["rings"], None)
    with reversed_programs():
        second = shares(inputs, LENGTHS["rings"], None)
    assert all(map(torch.equal, first, second))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [3, 16])
@pytest.mark.parametrize(
    ("lengths", "left", "tiles"),
    [
        ([1, 0, 1000, 65], None, 1 + 0 + 16 + 2),
        ([1000, 1000, 3, 500], 99, 2 + 2 + 1 + 2),  # from positions 900, 900, 0 and 400 on
        ([1001, 5000, 64, 1], 99, 16 + 16 + 1 + 1),  # of a ring buffer all slots
    ],
)
def test_shares_differ_by_one_tile_at_most(
    lengths: list[int], left: int | None, tiles: int, programs: int, monkeypatch: pytest.MonkeyPatch
):
    assert decode_launch("sm_90", 2, 8, 8, 32).block_n == 64
    counts, program = Counter(), [0]
    place, dot = InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_dot

    def noted(self: InterpreterBuilder, *indices: int) -> None:
        program[0] = indices[0]
        place(self, *indices)

    def counted(self: InterpreterBuilder, *operands: Any) -> Any:
        counts[program[0]] += 1
        return dot(self, *operands)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", noted)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    shares(make(1, slots=1000), lengths, programs, left)
    dots = [counts[i] for i in range(programs)]  # two for each tile
    assert sum(dots) == 2 * 2 * tiles  # of two key heads
    assert max(dots) - min(dots) <= 2


def test_slots_that_no_query_attends_to_may_be_nan():
    lengths = [0, 9, 150, 200]
    inputs = make(2)
    options = {"window": 90, "start_positions": torch.tensor([0, 5, 0, 199])}
    expected = run(inputs, lengths, "reference", **options)
    for row, (first, last) in enumerate([(0, 0), (5, 9), (59, 150), (199, 200)]):
        for x in inputs[1:]:
            x[row, :first], x[row, last:] = torch.nan, torch.nan
    assert max(map(error, run(inputs, lengths, "triton", torch.float32, **options), expected)) <= 1e-5


def test_keys_are_read_once():
    """All heads of a group and all new tokens share one reading."""
    q, k, v = (x.float() for x in make(4, heads=(8, 2)))
    with count_traffic() as launches:
        o = flash_decode(q, k, v, cache_lengths=torch.tensor([200] * 4), backend="triton")
    tiles, merged = launches
    assert tiles.loads["k"].total == k.nbytes
    assert tiles.loads["v"].total == v.nbytes
    assert set(merged.loads) <= {"lengths", "sums", "tops", "totals"}
    written = tiles.stores.get("o", (0, 0))[1] + merged.stores.get("o", (0, 0))[1]
    assert written == o.nbytes


def test_strided_inputs():
    q, k, v = make(2)
    inputs = [q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2), v[:, :, :1].expand(-1, -1, 2, -1)]
    slopes = torch.tensor(0.3).expand(4)
    expected = run(inputs, LENGTHS["ragged"], "reference", alibi_slopes=slopes)
    actual = run(inputs, LENGTHS["ragged"], "triton", torch.float32, alibi_slopes=slopes)
    assert max(map(error, actual, expected)) <= 1e-5


def test_no_rows_and_no_slots():
    inputs = make(2, slots=0)
    expected, actual = (
        run(inputs, [0, 0, 0, 0], backend, dtype, sinks=SINKS)
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert max(map(error, actual, expected)) <= 1e-5
    q, k, v = (x[:0].float() for x in make(2))
    o = flash_decode(q, k, v, cache_lengths=torch.zeros(0).long(), backend="triton")
    assert o.shape == (0, 2, 4, 8)


@pytest.mark.slow
def test_opcheck_and_one_graph():
    q, k, v = (x.float() for x in make(2, slots=20))
    lengths = torch.tensor([0, 1, 20, 33])
    torch.library.opcheck(decode.attend, (q, k, v, lengths, STARTS, 0.3, 3, SLOPES, SINKS, 1.5, 5))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_decode(q, k, v, cache_lengths=lengths, window=4, backend="triton")

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


def test_unsupported_inputs_raise():
    q, k, v = (x.float() for x in make(1))
    lengths = torch.tensor([1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"k_cache: expected a tensor without gradients, got requires_grad=True \("):
        flash_decode(q, k.clone().requires_grad_(), v, cache_lengths=lengths, backend="triton")
    with torch.no_grad():
        flash_decode(q, k.clone().requires_grad_(), v, cache_lengths=lengths, backend="triton")
    with pytest.raises(ValueError, match=r"q: expected float32, float16 or bfloat16, got torch.float64 \(with"):
        flash_decode(q.double(), k, v, cache_lengths=lengths, backend="triton")
