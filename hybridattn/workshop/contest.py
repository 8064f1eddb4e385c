"""The operators beside others' of the same mathematics, against what the machine can do.

First two ceilings are measured: bytes per second of a copy and FLOP per second of a matrix product. Then every work of
WORKS at every length, by every contestant that is installed: its result is compared with the fp64 reference, and only
a right one is timed. One line of JSON per figure, so that a run that was cut off goes on where it was.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridattn.kernels.flash_attention import flash_attention, flash_decode
from hybridattn.kernels.linear_attention import (
    gated_linear_attention,
    gated_linear_attention_step,
    taylor_linear_attention,
)
from hybridattn.kernels.linear_attention.chunked import CHUNK
from hybridattn.measure.provenance import provenance
from hybridattn.measure.timing import timed
from hybridattn.workshop.check import error, origin

COMPARED = 768  # first tokens of every result that are compared with the reference
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative L2 of operands rounded once
GPU_LENGTHS, CPU_LENGTHS = (4096, 16384, 1024, 65536), (1024,)  # the most telling first
SOFTMAX_LENGTHS = (16384, 4096, 32768, 1024)
CACHES = ((32768, 16), (524288, 1), (4096, 128), (4096, 16), (131072, 4), (32768, 1))  # tokens, batch

Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]


class Shape(NamedTuple):
    batch: int
    tokens: int  # of the sequence, or in the cache
    heads: int
    key_dim: int
    value_dim: int


class Work(NamedTuple):
    """What contestants do, each from the same inputs q, k, v, (g,) (state), as [batch, time, heads, dim].

    Attributes:
        gate: dims of g beyond [B,T,H]: 1 per channel, 0 per head; None without gates.
        flop: useful operations of a forward pass per token and head, from the shape.
        step: one new token after a state, instead of a sequence.
        cache: one new token whose keys and values are all tokens'; its inputs end with the rows' lengths.
        window: tokens that one sees, itself included; None is all.
        causal: no token sees later ones.
        key_dim: K, if not the usual one.
    """

    gate: int | None
    flop: Callable[[Shape], float]
    step: bool = False
    cache: bool = False
    window: int | None = None
    causal: bool = True
    key_dim: int | None = None


def _linear_flop(shape: Shape) -> float:
    return 4 * shape.key_dim * shape.value_dim + CHUNK * (shape.key_dim + shape.value_dim)


def _softmax(window: int | None = None, causal: bool = True) -> Work:
    def flop(shape: Shape) -> float:
        reach = min(window or shape.tokens, shape.tokens)
        # The first `reach` tokens of a causal sequence see half of that on average, later ones all of it.
        seen = reach * (1 - reach / (2 * shape.tokens)) if causal else reach
        return 2 * seen * (shape.key_dim + shape.value_dim)

    return Work(None, flop, window=window, causal=causal)


WORKS = {
    "gated, per channel": Work(1, _linear_flop),
    "gated step": Work(1, lambda shape: 5 * shape.key_dim * shape.value_dim, step=True),
    "softmax, causal": _softmax(),
    "softmax, one token": Work(None, lambda shape: 2 * (shape.key_dim + shape.value_dim), cache=True),
    "gated, per head": Work(0, _linear_flop),
    "softmax, window 512": _softmax(window=512),
    "softmax, window 4096": _softmax(window=4096),
    "softmax, full": _softmax(causal=False),
    "taylor": Work(None, lambda s: 2 * (s.key_dim + 1) * (s.key_dim + 2) * s.value_dim, key_dim=16),
}


def contestants(work: str, device: torch.device, peers: bool) -> Iterator[tuple[str, Call]]:
    """Names and calls: ours first; then, with ``peers``, what is installed and runs on the device."""
    yield "hybridattn", ours(work)
    if peers and work.startswith("softmax") and not WORKS[work].cache:
        yield from _softmax_peers(WORKS[work], device)
    if peers and work == "softmax, one token":
        yield "SDPA", _sdpa_one_token
    if peers and device.type == "cuda" and find_spec("fla"):
        yield from _flash_linear_attention(work)


def ours(work: str, backend: str | None = None) -> Call:
    """This library's operator for a work."""
    chosen = WORKS[work]
    if chosen.cache:
        return lambda q, k, v, lengths: flash_decode(q, k, v, cache_lengths=lengths, backend=backend)
    if work == "gated step":
        return partial(gated_linear_attention_step, backend=backend)
    if work.startswith("softmax"):
        return partial(flash_attention, window=chosen.window, causal=chosen.causal, backend=backend)
    operator = taylor_linear_attention if work == "taylor" else gated_linear_attention
    return lambda *x: operator(*x, backend=backend)[0]


def _softmax_peers(work: Work, device: torch.device) -> Iterator[tuple[str, Call]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def scaled_dot_product(backend: SDPBackend) -> Call:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=work.causal).transpose(1, 2)

        return call

    if work.window is None:
        yield "SDPA flash", scaled_dot_product(SDPBackend.FLASH_ATTENTION)
    if work.window is None and device.type == "cuda":
        yield "SDPA cuDNN", scaled_dot_product(SDPBackend.CUDNN_ATTENTION)
        yield "SDPA efficient", scaled_dot_product(SDPBackend.EFFICIENT_ATTENTION)
    if device.type == "cuda":
        yield "FlexAttention", _flex_attention(work)


def _sdpa_one_token(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """All caches are full, which it has no way to be told otherwise."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flex_attention(work: Work) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1]
        if tokens not in masks and work.causal:
            reach = work.window or tokens
            masks[tokens] = create_block_mask(
                lambda b, h, t, s: (t >= s) & (t - s < reach), None, None, tokens, tokens, device=q.device.type
            )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=masks.get(tokens)).transpose(1, 2)  # pyright: ignore

    return call


def _flash_linear_attention(work: str) -> Iterator[tuple[str, Call]]:
    from fla.ops.attn.parallel import parallel_attn  # pyright: ignore[reportMissingImports]
    from fla.ops.based import parallel_based  # pyright: ignore[reportMissingImports]
    from fla.ops.gla import chunk_gla, fused_recurrent_gla  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        o, after = fused_recurrent_gla(q, k, v, gk=g, initial_state=state, output_final_state=True)
        state.copy_(after)  # it has no update in place; below also without this
        return o

    theirs: dict[str, tuple[str, Call]] = {
        "gated, per channel": ("fla chunk_gla", lambda q, k, v, g: chunk_gla(q, k, v, g)[0]),  # pyright: ignore[reportCallIssue]
        "gated step": ("fla fused_recurrent_gla", step),
        "gated, per head": ("fla chunk_simple_gla", lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]),  # pyright: ignore
        "taylor": ("fla parallel_based", parallel_based),
        "softmax, causal": ("fla parallel_attn", parallel_attn),
        "softmax, window 512": ("fla parallel_attn", partial(parallel_attn, window_size=512)),
        "softmax, window 4096": ("fla parallel_attn", partial(parallel_attn, window_size=4096)),
    }
    if work in theirs:
        yield theirs[work]
    if work == "gated step":
        yield (
            "fla fused_recurrent_gla, state not copied",
            lambda q, k, v, g, state: fused_recurrent_gla(q, k, v, gk=g, initial_state=state, output_final_state=True)[
                0
            ],
        )


# ---------------------------------------------------------------------------------------------------------- measurement
def make_inputs(work: Work, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Signed inputs, GLA's default gates logsigmoid(N) / 16, and for a step a state in fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    rows = shape[:3]
    x = {"q": normal(*rows, shape.key_dim), "k": normal(*rows, shape.key_dim), "v": normal(*rows, shape.value_dim)}
    if work.gate is not None:
        x["g"] = F.logsigmoid(normal(*rows, *[shape.key_dim] * work.gate, dtype=torch.float32)).div(16).to(dtype)
    if work.cache:
        x["q"] = x["q"][:, :1].contiguous()
        x["lengths"] = torch.full((shape.batch,), shape.tokens, device=device)
    if work.step:
        x["state"] = normal(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)
    return x


def first_row(work: Work, x: Inputs) -> Inputs:
    """The first row in fp64; of a sequence its first tokens, or queries where these see later keys."""
    row = {name: value[:1] if name == "lengths" else value[:1].double() for name, value in x.items()}
    if work.step or work.cache:
        return row
    return {name: value[:, :COMPARED] if work.causal or name == "q" else value for name, value in row.items()}


def wrong_by(name: str, call: Call, x: Inputs) -> float:
    """Largest relative error of outputs and, for sequences, of the gradients of a loss over the first tokens."""
    work = WORKS[name]
    small = first_row(work, x)
    if work.step or work.cache:
        big = {key: value.clone() for key, value in x.items()}
        with torch.no_grad():
            expected, actual = ours(name, "reference")(*small.values()), call(*big.values())
        return error(actual[:1], expected)
    results = []
    for run, inputs in ((ours(name, "reference"), small), (call, x)):
        leaves = [value.detach().requires_grad_() for value in inputs.values()]
        o = run(*leaves)[:1, :COMPARED]
        do = torch.cos(torch.arange(o.numel(), device=o.device)).view(o.shape)
        gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
        compared = (gradient[:1, : like.shape[1]] for gradient, like in zip(gradients, small.values(), strict=True))
        results.append([o.detach(), *compared])
    return max(error(actual, expected) for expected, actual in zip(*results, strict=True))


def seconds_of(
    call: Callable[[], object], device: torch.device, samples: int, *, replay: bool = False
) -> dict[str, Any]:
    """Median and spread of the seconds of one call, by CUDA events on a GPU.

    Args:
        call: what is timed.
        device: where it runs.
        samples: timed calls.
        replay: on a GPU, time replays of a CUDA graph of many calls instead: a kernel of some microseconds is over
            before the next one is launched, and single calls would time the launches. Where a call cannot be captured,
            single ones are timed; ``graph`` of the result says which it was.
    """
    for _ in range(3):
        call()
    times = _replayed(call) if replay and device.type == "cuda" else []
    is_graph = bool(times)
    if device.type == "cuda" and not is_graph:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in events]
    elif device.type != "cuda":
        times = [timed(call) for _ in range(samples)]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    found = {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "samples": len(times)}
    return {**found, "graph": is_graph}


def _replayed(call: Callable[[], object]) -> list[float]:
    """Seconds of a call in each of ten replays of a CUDA graph; none where it cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        milliseconds: Any = do_bench_cudagraph(call, return_mode="all")
    except RuntimeError:  # it waits for the GPU, for one; if the GPU is lost, single calls fail as well and say so
        return []
    return [each / 1e3 for each in milliseconds]


def ceilings(device: torch.device, dtype: torch.dtype, samples: int) -> dict[str, float]:
    """Bytes per second, read and written, of a large copy, and FLOP per second of a large matrix product."""
    elements, size = (1 << 29, 8192) if device.type == "cuda" else (1 << 25, 1024)
    # Random: zeros may be moved faster than data are.
    a = torch.randint(256, (elements,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copy = seconds_of(lambda: b.copy_(a), device, samples)["median"]
    product = seconds_of(lambda: x @ y, device, samples)["median"]
    return {"copy_bytes_per_second": 2 * elements / copy, "matmul_flop_per_second": 2 * size**3 / product}


def measure(
    name: str, call: Call, x: Inputs, shape: Shape, most: dict[str, float], device: torch.device, samples: int
) -> dict[str, Any]:
    """Seconds forward and, for sequences, forward and backward; shares of the ceilings; peak memory on a GPU."""
    work = WORKS[name]
    with torch.inference_mode():
        forward = seconds_of(lambda: call(*x.values()), device, samples, replay=True)
    in_bytes = sum(value.numel() * value.element_size() for value in x.values())
    o_elements = shape.batch * x["q"].shape[1] * shape.heads * shape.value_dim
    moved = in_bytes + o_elements * x["v"].element_size() + (x["state"].numel() * 4 if work.step else 0)
    flop = work.flop(shape) * shape.batch * shape.tokens * shape.heads
    result: dict[str, Any] = {
        "forward_seconds": forward,
        "bytes_per_second": moved / forward["median"],
        "flop_per_second": flop / forward["median"],
    }
    result["share_of_copy"] = result["bytes_per_second"] / most["copy_bytes_per_second"]
    result["share_of_matmul"] = result["flop_per_second"] / most["matmul_flop_per_second"]
    if work.step or work.cache:
        return result
    leaves = [value.detach().requires_grad_() for value in x.values()]
    do = torch.randn_like(x["v"])

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, do)

    if device.type == "cuda":
        both()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    result["forward_backward_seconds"] = seconds_of(both, device, samples)
    return result


def plan(device: torch.device) -> Iterator[tuple[str, Shape]]:
    """Works and shapes; on a GPU about as many tokens at every length, and steps for several batches."""
    if device.type != "cuda":
        for tokens in CPU_LENGTHS:
            for name, work in WORKS.items():
                shape = Shape(1, tokens, 4, work.key_dim or 64, 64)
                yield name, shape._replace(batch=8, tokens=1) if work.step else shape
        return
    for tokens in GPU_LENGTHS:
        for name, work in WORKS.items():
            if not work.step and not name.startswith("softmax"):
                yield name, Shape(max(1, 32768 // tokens), tokens, 16, work.key_dim or 128, 128)
    for batch in (64, 256, 1):
        yield "gated step", Shape(batch, 1, 16, 128, 128)
    for heads, dim in ((16, 128), (32, 64)):
        for tokens in SOFTMAX_LENGTHS:
            for name in ("softmax, causal", "softmax, full"):
                yield name, Shape(max(1, 32768 // tokens), tokens, heads, dim, dim)
        for name in ("softmax, window 512", "softmax, window 4096"):
            yield name, Shape(1, 32768, heads, dim, dim)
    for tokens, batch in CACHES:
        yield "softmax, one token", Shape(batch, tokens, 16, 128, 128)


def run(device: str, peers: bool, samples: int = 15, out: Path | None = None) -> Path:
    """Measure, print and append to ``out``.

    Args:
        device: "cuda" or "cpu".
        peers: also time what others have installed.
        samples: timed calls per figure.
        out: JSON lines; what is there of the same code, versions, device and configuration is not measured again. By
            default ``results/<device>/kernels.jsonl``.
    """
    if samples < 3:
        raise ValueError(f"expected samples >= 3, got samples={samples}")
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    source = origin(place)
    if out is None:
        out = Path("results", "".join(c if c.isalnum() else "-" for c in source["device"]).lower(), "kernels.jsonl")
    config = {"dtype": str(dtype), "samples": samples, "compared": COMPARED, "tolerance": TOLERANCE[dtype]}
    facts = provenance(config)
    source = {**source, **{key: facts[key] for key in ("date", "versions", "cpu", "threads", "config_sha256")}}
    same = ("device", "torch", "triton", "source_sha256", "config_sha256")
    lines = list(map(json.loads, out.read_text().splitlines())) if out.exists() else []
    done = {
        (line["work"], line["contestant"], *line["shape"]) for line in lines if all(line[k] == source[k] for k in same)
    }
    most = ceilings(place, dtype, samples)
    print(
        f"{source['device']}, {str(dtype).removeprefix('torch.')}, torch {source['torch']}, commit {source['commit']}"
    )
    copy, product = (value / 1e9 for value in most.values())
    print(f"copy {copy:.0f} GB/s, matrix product {product:.0f} GFLOP/s")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for name, shape in plan(place):
            x = make_inputs(WORKS[name], shape, dtype, place)
            for contestant, call in contestants(name, place, peers):
                if (name, contestant, *shape) in done:
                    continue
                result = attempt(name, call, x, shape, most, place, dtype, samples)
                line = {"work": name, "contestant": contestant, "shape": shape, **result, **most, **source}
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(describe(line), flush=True)
                if "CUDA error" in line.get("reason", ""):
                    raise ValueError(
                        f"{contestant}: the GPU is lost to this process; run again to go on with the others"
                    )
    return out


def attempt(name, call, x, shape, most, device, dtype, samples) -> dict[str, Any]:
    """The figures, or why there are none: a wrong result has no speed."""
    try:
        wrong = wrong_by(name, call, x)
        if not wrong <= TOLERANCE[dtype]:
            return {
                "error": wrong,
                "reason": f"error {wrong:.1e} against the reference, at most {TOLERANCE[dtype]:.0e}",
            }
        return {"error": wrong, **measure(name, call, x, shape, most, device, samples)}
    except Exception as reason:  # a contestant may lack a case; the others still run
        return {"reason": f"{type(reason).__name__}: {reason}"[:300]}


def describe(line: dict[str, Any]) -> str:
    """One line of print: milliseconds and shares of the ceilings."""
    title = f"  {line['work']:<20}{'x'.join(map(str, line['shape'])):<20}{line['contestant']:<26}"
    if "reason" in line:
        return title + line["reason"]
    forward, both = line["forward_seconds"], line.get("forward_backward_seconds")
    text = f"{forward['median'] * 1e3:9.3f} ms forward ({forward['p10'] * 1e3:.3f} to {forward['p90'] * 1e3:.3f})"
    text += f", {line['share_of_copy']:4.0%} of copy, {line['share_of_matmul']:4.0%} of matmul"
    if both:
        text += f", {both['median'] * 1e3:9.3f} ms with backward"
    text += f", peak {line['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in line else ""
    is_single = line["architecture"] != "cpu" and not forward["graph"]
    return title + text + (", not in a CUDA graph" if is_single else "")
