"""Chunked linear attention in Triton against the fp64 reference: the laws of DESIGN.md, at sizes of the interpreter."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import gated_linear_attention, linear_attention
from hybridattn.kernels.linear_attention.triton import op
from hybridattn.kernels.linear_attention.triton.compile_cases import sweep_traffic
from hybridattn.kernels.linear_attention.triton.launch import chunk_launch, segments
from hybridattn.kernels.linear_attention.triton.primitives import COOL
from hybridattn.workshop.traffic import count_traffic, over_target

LENGTHS = [0, 1, 7, 64, 65]  # and 150
CHANNEL_GATES: dict[str, Callable[[Any], Tensor]] = {
    "mild": lambda shape: -0.1 * torch.rand(shape),
    "strong": lambda shape: -5 * torch.rand(shape),
    "hot": lambda shape: -60 * torch.rand(shape),
    "all -60": lambda shape: torch.full(shape, -60.0),
    "resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -60.0, -0.05 * torch.rand(shape)),
    "infinite resets": lambda shape: torch.where(torch.rand(shape) < 0.05, -torch.inf, -0.05),
}
SHAPES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "per channel": lambda t, h, k: (1, t, h, k),
    "per head": lambda t, h, k: (1, t, h),
    "constant": lambda t, h, k: (h,),
}
CASES = [
    (shape, gates) for shape in SHAPES for gates in CHANNEL_GATES if shape == "per channel" or "resets" not in gates
]
CASES += [("none", "none"), ("per head", "infinite resets")]
# KINDS: one case per kind of gate, each with its own compiled kernel. NARROW: the cases for 16-bit products.
KINDS = [("per channel", "hot"), ("per head", "hot"), ("constant", "strong"), ("none", "none")]
NARROW = [(shape, gates) for shape, gates in CASES if shape == "per channel"] + [("per head", "strong"), *KINDS[1:]]
HEADS = {"grouped queries": (4, 2, 2), "grouped values": (1, 1, 2)}  # of q, k, v
# K and V: rows that descriptors can load, rows that they cannot, two blocks of keys (one partial), two of values.
DIMS = [(8, 8), (20, 5), (72, 8), (16, 72), (1, 8), (8, 1)]


def make(
    tokens: int,
    dims: tuple[int, int] = (8, 8),
    case: tuple[str, str] = ("per channel", "hot"),
    heads: tuple[int, int, int] = (1, 1, 1),
) -> list[Tensor]:
    """q, k, v, the initial state and, unless there are none, g: in fp64."""
    (shape, gates), (key_dim, value_dim) = case, dims
    q, k, v = (torch.randn(1, tokens, h, d) for h, d in zip(heads, (key_dim, key_dim, value_dim), strict=True))
    x = [q, k, v, torch.randn(1, max(heads[1:]), key_dim, value_dim)]
    return [
        y.double()
        for y in (x if shape == "none" else [*x, CHANNEL_GATES[gates](SHAPES[shape](tokens, heads[1], key_dim))])
    ]


def run(x: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    q, k, v, state, *g = x
    call = gated_linear_attention if g else linear_attention
    o, final = call(q, k, v, *g, initial_state=state, output_final_state=True, backend=backend, **options)
    assert final is not None
    return [o, final]


def to(x: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Inputs in a dtype; the state in fp32, or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [y.to(wide if n == 3 or y.dim() == 1 else dtype) for n, y in enumerate(x)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; the absolute one if ``expected`` is zero."""
    assert actual.shape == expected.shape
    norm, distance = expected.double().norm(), (actual.double() - expected.double()).norm()
    return (distance / norm if norm > 0 else distance).item()


def with_gradients(x: list[Tensor], backend: str, grads: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [y.clone().requires_grad_() for y in x]
    results = run(leaves, backend, **options)
    pairs = [
        (y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if y.requires_grad
    ]  # no tokens: o does not
    given = torch.autograd.grad(
        [y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [y.detach() for y in results] + list(given)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [pytest.param(case, 150, marks=pytest.mark.slow) for case in CASES]
    + [(case, tokens) for case in KINDS for tokens in LENGTHS],
)
def test_triton_equals_reference(case: tuple[str, str], tokens: int):
    x = make(tokens, case=case)
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    expected = with_gradients(x, "reference", grads)
    actual = with_gradients(to(x, torch.float32), "triton", grads)
    assert [y.dtype for y in actual] == [torch.float32] * len(actual)
    assert max(map(error, actual[:2], expected)) <= 1e-6
    assert max(map(error, actual[2:], expected[2:])) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dims"),
    [(("per channel", "resets"), dims) for dims in DIMS[1:]]
    + [(case, dims) for case in (("per head", "hot"), ("none", "none")) for dims in DIMS[1:4]],
)
def test_dims(case: tuple[str, str], dims: tuple[int, int]):
    x = make(70, dims, case)
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    actual = with_gradients(to(x, torch.float32), "triton", grads)
    assert max(map(error, actual, with_gradients(x, "reference", grads))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in NARROW]
    + [(case, torch.float16) for case in (("per channel", "resets"), ("per head", "hot"), ("none", "none"))],
)
def test_sixteen_bit_errors_are_close_to_those_of_rounded_operands(case: tuple[str, str], dtype: torch.dtype):
    """The error of results is at most 1.5 times, of gradients (rounded themselves) twice that of rounding the operands.

    The gradient of a constant gate is a single number, whose rounding error may be nearly 0 by chance. So 16 heads have
    the same gate.
    """
    x = make(150, (24, 16), case, heads=(16, 16, 16) if case[0] == "constant" else (1, 1, 1))
    if case[0] == "constant":
        x[4] = x[4][:1].expand(16)
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    exact = with_gradients(x, "reference", grads)
    actual = with_gradients(to(x, dtype), "triton", grads)
    rounded = to(to(x, dtype), torch.float64)
    formula = with_gradients(rounded, "reference", [grads[0].to(dtype).double(), grads[1].float().double()])
    assert [y.dtype for y in actual[:2]] == [dtype, torch.float32]
    for n, (result, truth, of_rounded) in enumerate(zip(actual, exact, formula, strict=True)):
        assert error(result, truth) <= (1.5 if n < 2 else 2) * error(of_rounded.to(result.dtype), truth)


@pytest.mark.slow
def test_groups_of_values_are_summed_in_fp32():
    """V exceeds the widest row's values per launch, with 16-bit operands."""
    x = make(64, (16, 300), ("per channel", "resets"))
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    exact = with_gradients(x, "reference", grads)[2]
    rounded = with_gradients(to(to(x, torch.bfloat16), torch.float64), "reference", [grads[0].bfloat16(), grads[1]])[2]
    actual = with_gradients(to(x, torch.bfloat16), "triton", grads)[2]
    assert error(actual, exact) <= 1.5 * error(rounded.bfloat16(), exact)


def test_gradients_of_mixed_dtypes():
    q, k, v, state, g = make(40, (8, 8), ("per channel", "resets"))
    x = [q.bfloat16(), k.bfloat16(), v.float(), state.float(), g.float()]
    grads = [torch.randn_like(y) for y in run([y.double() for y in x], "reference")]
    expected = with_gradients([y.double() for y in x], "reference", grads)
    actual = with_gradients(x, "triton", grads)
    assert [y.dtype for y in actual[2:]] == [y.dtype for y in x]
    assert max(error(a, e) for a, e in zip(actual[4:], expected[4:], strict=True)) <= 1e-5  # of v, the state and g


@pytest.mark.slow
def test_more_values_than_a_launch_takes():
    x = make(70, (16, 160), ("per channel", "resets"))
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    with count_traffic() as launches:
        actual = with_gradients(to(x, torch.float32), "triton", grads)
    assert [launch.kernel for launch in launches].count("sweep_keys") == 2
    assert max(map(error, actual, with_gradients(x, "reference", grads))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [("per channel", "resets"), ("per head", "strong"), ("none", "none")], ids=", ".join)
@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads(heads: str, case: tuple[str, str]):
    x = make(70, case=case, heads=HEADS[heads])
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    actual = with_gradients(to(x, torch.float32), "triton", grads)
    assert max(map(error, actual, with_gradients(x, "reference", grads))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "lengths"),
    [(("per channel", "resets"), lengths) for lengths in ([], [0], [3, 0, 70, 1, 64], [128, 2], [1, 65])]
    + [(("per head", "strong"), [3, 0, 70, 1, 64])],
)
def test_packed_equals_one_by_one(case: tuple[str, str], lengths: list[int]):
    rest = 4  # tokens past the last offset belong to no sequence
    q, k, v, state, g = make(sum(lengths) + rest, case=case)
    state = torch.randn(len(lengths), *state.shape[1:]).double()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    x = [q, k, v, state, g]
    grads = [torch.randn_like(y) for y in run(x, "reference", cu_seqlens=ends)]
    expected = with_gradients(x, "reference", grads, cu_seqlens=ends)
    actual = with_gradients(to(x, torch.float32), "triton", grads, cu_seqlens=ends)
    assert not actual[0][:, ends[-1] :].any()
    assert max(map(error, actual, expected)) <= 1e-5


def test_strided_offsets():
    x = to(make(70), torch.float32)
    ends = torch.tensor([[0, 7], [70, 7]])[:, 0]
    plain = run(x, "triton", cu_seqlens=ends.contiguous())
    assert all(torch.equal(y, z) for y, z in zip(run(x, "triton", cu_seqlens=ends), plain, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [[0, 150], [1, 64, 65], [100]])
def test_any_split_with_the_state_carried_over(cuts: list[int]):
    q, k, v, state, g = to(make(150, (20, 5), ("per channel", "resets")), torch.float32)
    o, final = run([q, k, v, state, g], "triton")
    parts = []
    for first, last in pairwise([0, *cuts, 150]):
        part, state = run([*(y[:, first:last] for y in (q, k, v)), state, g[:, first:last]], "triton")
        parts.append(part)
    assert error(torch.cat(parts, 1), o) <= 1e-6
    assert error(state, final) <= 1e-6


@pytest.mark.slow
def test_strided_inputs_and_mixed_dtypes():
    x = make(70, (24, 8), ("per channel", "resets"), HEADS["grouped queries"])
    plain = run(to(x, torch.float32), "triton")
    wide = [torch.randn(1, 70, 3, y.shape[2], y.shape[3] + 1) for y in x[:3]]
    parts = [y[:, :, 1, :, 1:].copy_(z) for y, z in zip(wide, x[:3], strict=True)]
    turned = [y.float().transpose(0, -1).contiguous().transpose(0, -1) for y in (*x[:3], x[4])]
    for strided in ([*parts, x[3].float(), x[4].float()], [*turned[:3], x[3].float(), turned[3]]):
        assert all(torch.equal(y, z) for y, z in zip(run(strided, "triton"), plain, strict=True))
    mixed = [x[0].float(), x[1].bfloat16(), x[2].half(), x[3].float(), x[4].float()]
    o, state = run(mixed, "triton")
    expected = run([y.double() for y in mixed], "reference")
    assert o.dtype == torch.float16
    assert error(o, expected[0]) <= 1e-3
    assert error(state, expected[1]) <= 1e-6


def test_without_a_state():
    q, k, v, _, g = to(make(70), torch.float32)
    o, state = gated_linear_attention(q, k, v, g, backend="triton")
    assert state is None
    assert error(o, gated_linear_attention(q, k, v, g, backend="reference")[0]) <= 1e-6


def test_the_normalised_operator():
    q, k, v, *_ = make(70, case=("none", "none"))
    x = [q.exp(), k.exp(), v]
    o, state = linear_attention(*(y.float() for y in x), normalize=True, output_final_state=True, backend="triton")
    expected, final = linear_attention(*x, normalize=True, output_final_state=True, backend="reference")
    assert state is not None
    assert final is not None
    assert max(map(error, (o, *state), (expected, *final))) <= 1e-6


@pytest.mark.parametrize("bits", [COOL.value + 1e-3, COOL.value - 1e-3])
def test_gates_just_below_and_above_the_hot_limit(bits: float):
    q, k, v, state, g = make(64)
    x = [q, k, v, state, torch.full_like(g, bits / 64 / 1.4426950408889634)]
    actual = run(to(x, torch.float32), "triton")
    assert max(map(error, actual, run(x, "reference"))) <= 1e-6


@pytest.mark.parametrize("empty", [(0, 3, 1, 8, 5), (1, 3, 0, 8, 5), (1, 3, 1, 0, 5), (1, 3, 1, 8, 0)])
def test_empty_dimensions(empty: tuple[int, ...]):
    b, t, h, key_dim, value_dim = empty
    q, v = torch.randn(b, t, h, key_dim, requires_grad=True), torch.randn(b, t, h, value_dim)
    state = torch.randn(b, h, key_dim, value_dim)
    o, final = run([q, q, v, state], "triton", scale=1.0)
    assert torch.equal(o, torch.zeros(b, t, h, value_dim))
    assert torch.equal(final, state)
    (dq,) = torch.autograd.grad(o.sum() + final.sum(), [q])
    assert torch.equal(dq, torch.zeros_like(q))


@pytest.mark.slow
def test_opcheck():
    q, k, v, state, g = to(make(3), torch.float32)
    for x in (
        (q, k, v, g, 0.7, False, False, state, None),
        (q, k, v, None, 0.7, True, True, None, torch.tensor([0, 1, 3])),
    ):
        torch.library.opcheck(
            op.forward,
            tuple(
                y.requires_grad_() if y is not None and torch.is_tensor(y) and y.is_floating_point() else y for y in x
            ),
        )


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    q, k, v, _, g = to(make(3), torch.float32)
    q.requires_grad_()

    def call(q, k, v, g):
        return gated_linear_attention(2 * q, k, v, g, backend="triton")[0].square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, g), call(q, k, v, g))
    assert all(
        torch.equal(*torch.autograd.grad(compiled(q, k, v, g), q), y) for y in torch.autograd.grad(call(q, k, v, g), q)
    )


LACKS = {
    "q: expected float32, float16 or bfloat16, got torch.float64": lambda q, k, v, s, g: [q.double(), k, v, s, g],
    "initial_state: expected float32, got torch.float64": lambda q, k, v, s, g: [q, k, v, s.double(), g],
    "k: expected a key dim of at most 256, got 264": lambda q, k, v, s, g: [
        *(y.repeat(1, 1, 1, 33) for y in (q, k)),
        v,
        s.repeat(1, 1, 33, 1),
        g.repeat(1, 1, 1, 33),
    ],
    "v: expected a value dim of at most 512, got 520": lambda q, k, v, s, g: [
        q,
        k,
        v.repeat(1, 1, 1, 65),
        s.repeat(1, 1, 1, 65),
        g,
    ],
}


@pytest.mark.parametrize("message", LACKS)
def test_the_named_backend_runs_or_raises(message: str):
    x = LACKS[message](*to(make(3), torch.float32))
    with pytest.raises(ValueError, match=rf"{message} \(with backend='triton'\)"):
        run(x, "triton")
    q, k, v, state, g = x
    gated_linear_attention(q, k, v, g, initial_state=state)  # without a name another backend runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "heads", "parts"),
    [
        (("per channel", "resets"), (1, 1, 1), 5),
        (("per channel", "resets"), (4, 2, 2), 2),
        (("per channel", "resets"), (1, 1, 2), 2),
        (("per head", "strong"), (4, 2, 2), 2),
        (("none", "none"), (1, 1, 2), 5),
    ],
)
def test_segments_of_a_sequence(case: tuple[str, str], heads: tuple[int, int, int], parts: int, monkeypatch):
    """Includes more segments than chunks."""
    monkeypatch.setattr(op, "segments", lambda *_: parts)
    x = make(140, (24, 16), case, heads)  # three chunks
    grads = [torch.randn_like(y) for y in run(x, "reference")]
    with count_traffic() as launches:
        actual = with_gradients(to(x, torch.float32), "triton", grads)
    assert [launch.kernel for launch in launches].count("scan_states") == 3  # once forward
    assert max(map(error, actual, with_gradients(x, "reference", grads))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[200], [3, 0, 150, 64]])
def test_segments_of_packed_sequences(lengths: list[int], monkeypatch):
    monkeypatch.setattr(op, "segments", lambda *_: 2)
    q, k, v, state, g = make(sum(lengths), case=("per channel", "resets"))
    x = [q, k, v, torch.randn(len(lengths), *state.shape[1:]).double(), g]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    grads = [torch.randn_like(y) for y in run(x, "reference", cu_seqlens=ends)]
    expected = with_gradients(x, "reference", grads, cu_seqlens=ends)
    actual = with_gradients(to(x, torch.float32), "triton", grads, cu_seqlens=ends)
    assert max(map(error, actual, expected)) <= 1e-5


@pytest.mark.parametrize(
    ("programs", "chunks", "processors", "expected"),
    [(132, 1000, 132, 1), (131, 1000, 132, 3), (1, 1000, 132, 250), (16, 1000, 132, 17), (1, 7, 132, 1), (1, 0, 1, 1)],
)
def test_segments_fill_the_device(programs: int, chunks: int, processors: int, expected: int):
    assert segments(programs, chunks, processors) == expected


PER_SEQUENCE = {"first", "last", "dlast", "dfirst"}  # tensors that do not grow with the tokens


@pytest.mark.slow
def test_bytes_of_a_token_and_head():
    """Distinct bytes; q, k, v, g and o have 1280, with gradients 2304."""
    tokens = 256
    q, k, v, state, g = to(make(tokens, (128, 128), ("per channel", "mild")), torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    moved = []
    with count_traffic() as launches:
        o, _ = gated_linear_attention(*leaves, initial_state=state, backend="triton")
        forward = len(launches)
        o.backward(torch.randn_like(o))
    for part in (launches[:forward], launches[forward:]):
        names = [{**x.loads, **x.stores} for x in part]
        moved.append(
            sum(
                bytes_.unique
                for x in part
                for kind in (x.loads, x.stores)
                for name, bytes_ in kind.items()
                if name not in PER_SEQUENCE
            )
            / tokens
        )
        assert any(name in PER_SEQUENCE for each in names for name in each)
    assert moved[0] <= 1.3 * 1280
    assert moved[1] <= 2.5 * 2304


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "heads"), [((16, 160), (1, 1, 1)), ((72, 72), (1, 1, 1)), ((72, 72), (4, 2, 2)), ((72, 72), (1, 1, 2))]
)
def test_sweeps_move_no_more_than_declared(dims: tuple[int, int], heads: tuple[int, int, int], monkeypatch):
    x = to(make(70, dims, ("per channel", "resets"), heads), torch.bfloat16)
    declared, exceeded = [], []
    for name in ("states", "sweep_keys", "sweep_values"):
        monkeypatch.setattr(op, name, _Noting(getattr(op, name), declared))
    with count_traffic() as launches:
        with_gradients(x, "triton", [torch.randn_like(y) for y in run(x, "reference")])
    swept = [launch for launch in launches if not launch.kernel.startswith("repair")]
    assert [launch.kernel for launch in swept] == [kernel for kernel, _ in declared]
    for launch, (kernel, tensors) in zip(swept, declared, strict=True):
        row = chunk_launch(kernel, "sm_90", dims[0], dims[1], "bf16")
        exceeded += over_target(launch, sweep_traffic(row, tensors, max(heads)), tensors)
    assert exceeded == []


class _Noting:
    """A kernel that records its tensors, by name, at every launch."""

    def __init__(self, kernel: Any, noted: list[tuple[str, dict[str, Tensor]]]):
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            tensors = {}
            for name, x in zip(self.kernel.arg_names, arguments, strict=False):
                x = x[0] if isinstance(x, tuple) else x.base.transpose(1, 2) if hasattr(x, "base") else x
                if torch.is_tensor(x):
                    tensors[name] = x
            self.noted.append((self.kernel.fn.__name__, tensors))
            self.kernel[grid](*arguments, **options)

        return launch
