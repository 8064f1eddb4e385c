"""The traffic of the step is within its declared bounds; the traffic counter is right for kernels of known traffic."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridattn.kernels.linear_attention.triton import decode
from hybridattn.kernels.linear_attention.triton.compile_cases import step_traffic
from hybridattn.kernels.linear_attention.triton.launch import StepLaunch, step_launch
from hybridattn.kernels.runtime.architectures import Traffic
from hybridattn.workshop.traffic import Launch, Moved, count_traffic, over_target

B, T = 2, 3


def make(key_dim: int, value_dim: int, queries: int = 2, states: int = 2) -> dict[str, Tensor]:
    """Arguments of a step in bf16, two key heads."""
    shapes = {"q": (queries, key_dim), "k": (2, key_dim), "v": (states, value_dim), "g": (2, key_dim)}
    x = {name: torch.randn(B, T, *shape).bfloat16() for name, shape in shapes.items()}
    return {**x, "g": -x["g"].abs(), "state": torch.randn(B, states, key_dim, value_dim)}


def count(x: dict[str, Tensor]) -> tuple[Launch, Tensor]:
    with count_traffic() as launches:
        o = decode.step(x["q"], x["k"], x["v"], x["g"], 1.0, x["state"])
    (launch,) = launches
    return launch, o


def exceeded(launch: Launch, o: Tensor, x: dict[str, Tensor]) -> list[str]:
    target = step_traffic(step_launch("sm_90", x["q"].shape[3]), *x.values())
    return over_target(launch, target, {**x, "o": o})


@pytest.mark.parametrize("dims", [(16, 16), (100, 70), (24, 130)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (2, 4)])
def test_a_step_moves_no_more_than_declared(dims: tuple[int, int], heads: tuple[int, int]):
    x = make(*dims, *heads)
    launch, o = count(x)
    assert launch.kernel == "step_kernel"
    assert exceeded(launch, o, x) == []
    state = x["state"].numel() * 4
    assert launch.loads["state"] == launch.stores["state"] == Moved(state, state)  # read once, written once
    everything = sum(y.numel() * y.element_size() for y in x.values()) + state + o.numel() * 2
    assert launch.unique == everything
    assert launch.unique / (B * T * heads[1]) >= 2 * 4 * dims[0] * dims[1] / T  # of a token and head, the state's share


def test_a_launch_that_reads_more_is_reported(monkeypatch: pytest.MonkeyPatch):
    narrow = StepLaunch(16, 16, 4, 1, False)  # more blocks of columns than declared: q, k and g are read more often
    monkeypatch.setattr(decode, "_launch", lambda device, key_dim: narrow)
    x = make(16, 64)
    lines = exceeded(*count(x), x)
    assert [line.partition(",")[0] for line in lines] == [f"loads {8 * x[n].numel()} bytes of {n}" for n in "qkg"]


@pytest.mark.parametrize(
    ("loads", "stores", "unique", "lines"),
    [
        ({"x": Moved(16, 16)}, {"o": Moved(16, 16)}, 1.0, []),
        ({"x": Moved(16, 16)}, {"o": Moved(16, 32)}, 1.0, ["stores 32 bytes of o, over 1 times 16"]),
        ({"o": Moved(16, 16)}, {"o": Moved(16, 16)}, 1.0, ["loads 16 bytes of o, over 0 times 16"]),
        ({}, {"x": Moved(16, 16)}, 1.0, ["stores 16 bytes of x, over 0 times 16"]),
        ({"x": Moved(16, 16)}, {"o": Moved(16, 16)}, 0.5, ["32 distinct bytes are over 0.5 times 32"]),
    ],
)
def test_messages_about_exceeded_bounds(loads: dict, stores: dict, unique: float, lines: list[str]):
    target = Traffic(unique, {"x": 1.0}, {"o": 1.0})
    assert over_target(Launch("k", loads, stores), target, {"x": torch.empty(4), "o": torch.empty(4)}) == lines


@triton.jit
def swap_if(x, N: tl.constexpr):
    tl.atomic_cas(x + tl.arange(0, N), tl.zeros([N], tl.int32), tl.full([N], 7, tl.int32))


def test_compare_and_swap_counts():
    x = torch.tensor([0, 1, 0, 2], dtype=torch.int32)
    with count_traffic() as launches:
        swap_if[(1,)](x, 4)
    assert x.tolist() == [7, 1, 7, 2]
    assert launches[0].loads == launches[0].stores == {"x": Moved(16, 16)}


@pytest.mark.parametrize("name", ["K", "V"])
def test_an_inserted_read_out_of_bounds_raises(name: str, monkeypatch: pytest.MonkeyPatch):
    x = make(9, 7)
    count(x)
    right = decode.step_constexprs

    def wrong(*arguments):
        constexprs = right(*arguments)
        return {**constexprs, name: constexprs[name] + 1}  # one row or column too many passes the mask

    monkeypatch.setattr(decode, "step_constexprs", wrong)
    with pytest.raises(
        InterpreterError, match=r"OutOfBounds\('step_kernel: \d+ of \d+ lanes (load|store) outside q, k"
    ):
        count(x)


def test_a_gap_of_a_strided_view_is_outside():
    wide = torch.zeros(4, 8)

    with count_traffic() as launches:
        copy_rows[(1,)](wide[:, :4], torch.empty(4, 4), 8, 4, 4)
    assert launches[0].loads["x"] == Moved(64, 64)
    with count_traffic(), pytest.raises(InterpreterError, match="copy_rows: 12 of 16 lanes load outside x, out"):
        copy_rows[(1,)](wide[:, :1], torch.empty(4, 4), 8, 4, 4)


@triton.jit
def copy_rows(x, out, stride, rows, N: tl.constexpr):
    i, j = tl.arange(0, 4)[:, None], tl.arange(0, N)[None, :]
    tl.store(out + i * N + j, tl.load(x + i * stride + j, mask=i < rows, other=0.0), mask=i < rows)


def test_only_lanes_that_are_not_masked_count():
    with count_traffic() as launches:
        copy_rows[(1,)](torch.zeros(4, 4), torch.empty(4, 4), 4, 3, 4)
        copy_rows[(2,)](torch.zeros(4, 4), torch.empty(4, 4), 4, 4, 4)
    assert launches[0].loads == {"x": Moved(48, 48)}
    assert launches[0].stores == {"out": Moved(48, 48)}
    assert launches[1].loads == {"x": Moved(64, 128)}  # by two programs
    assert (launches[1].unique, launches[1].total) == (128, 256)


@triton.jit
def copy_both(pair, out):
    for n in tl.static_range(2):
        tl.store(out + n, tl.load(pair[n] + 1))


def test_the_tensors_of_a_tuple_count_together():
    out = torch.empty(2)
    with count_traffic() as launches:
        copy_both[(1,)]((torch.arange(3.0), torch.arange(5.0, 8.0)), out)
    assert out.tolist() == [1, 6]
    assert launches[0].loads == {"pair": Moved(8, 8)}


@triton.jit
def copy_block(x, out, add, N: tl.constexpr):
    made = tl.make_tensor_descriptor(out, [4, N], [N, 1], [4, N])
    made.store([0, 0], x.load([2, 0]))
    tl.atomic_add(add + tl.arange(0, N), 1.0, mask=tl.arange(0, N) < 3)


def test_descriptors_and_atomics_count():
    x, out, add = torch.randn(4, 4), torch.empty(4, 4), torch.zeros(4)
    with count_traffic() as launches:
        copy_block[(1,)](TensorDescriptor.from_tensor(x, [4, 4]), out, add, 4)
    assert torch.equal(out, torch.cat((x[2:], torch.zeros(2, 4))))
    assert launches[0].loads == {"x": Moved(32, 32), "add": Moved(12, 12)}  # rows past the end of x are not read
    assert launches[0].stores == {"out": Moved(64, 64), "add": Moved(12, 12)}
