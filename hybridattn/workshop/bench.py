"""Speed of the linear-attention operators on a CPU, beside the token-by-token reference and PyTorch's SDPA.

Every result is compared with the reference before it is timed: a wrong result has no speed.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridattn.kernels.linear_attention import gated_linear_attention, linear_attention
from hybridattn.kernels.linear_attention.chunked import CHUNK
from hybridattn.measure.provenance import provenance
from hybridattn.measure.timing import timed

SHAPE = {"batch": 1, "heads": 4, "key_dim": 64, "value_dim": 64}
TOLERANCE = 1e-5  # relative L2 against the reference, both fp32


def flop_per_token_and_head(key_dim: int, value_dim: int) -> int:
    """Useful operations: 2KV into the state, 2KV out of it, and the causal half of a chunk's products."""
    return 4 * key_dim * value_dim + CHUNK * (key_dim + value_dim)


def median_seconds(call: Callable[[], object], samples: int, warmup: int = 3) -> float:
    for _ in range(warmup):
        call()
    return statistics.median(timed(call) for _ in range(samples))


def matmul_rate(samples: int, size: int = 2048) -> float:
    """FLOP/s of one large fp32 matrix product, the ceiling of this machine."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / median_seconds(lambda: a @ b, samples)


def make_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and GLA's default gates, logsigmoid(N(0, 1)) / 16 per channel."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, key_dim, value_dim = SHAPE.values()
    dims = (key_dim, key_dim, value_dim, key_dim)
    q, k, v, gate = (torch.randn(batch, tokens, heads, dim, generator=generator) for dim in dims)
    return q, k, v, F.logsigmoid(gate) / 16


def check(inputs: tuple[Tensor, ...]) -> None:
    """Raise a RuntimeError if the torch backend is not the reference."""
    result, expected = (gated_linear_attention(*inputs, backend=backend)[0] for backend in ("torch", "reference"))
    error = ((result - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"gated_linear_attention: error {error:.1e} against the reference, expected {TOLERANCE:.0e}")


def backward(inputs: tuple[Tensor, ...]) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    gated_linear_attention(*leaves)[0].sum().backward()


def run(tokens: int = 4096, samples: int = 15) -> dict[str, Any]:
    """Measure and print.

    Args:
        tokens: T of the comparison with the reference; twice as many for the comparison with SDPA.
        samples: timed calls per figure; medians are reported.

    Returns:
        JSON values: seconds by operator, the ratios that the goals are about, and where they come from.
    """
    if tokens < CHUNK or samples < 3:
        raise ValueError(f"expected tokens >= {CHUNK} and samples >= 3, got tokens={tokens}, samples={samples}")
    short, long = make_inputs(tokens), make_inputs(2 * tokens)
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        check(short)
        ceiling = matmul_rate(samples)
        seconds["gated, per channel"] = median_seconds(lambda: gated_linear_attention(*short), samples)
        per_head = (*short[:3], short[3][..., 0].contiguous())
        seconds["gated, per head"] = median_seconds(lambda: gated_linear_attention(*per_head), samples)
        seconds["no gate"] = median_seconds(lambda: linear_attention(*short[:3]), samples)
        seconds["gated, per channel, 2T"] = median_seconds(lambda: gated_linear_attention(*long), samples)
        q, k, v = (x.transpose(1, 2).contiguous() for x in long[:3])
        seconds["SDPA, causal, 2T"] = median_seconds(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), samples
        )
        seconds["reference"] = median_seconds(
            lambda: gated_linear_attention(*short, backend="reference"), samples=3, warmup=1
        )
    seconds["gated, per channel, forward and backward"] = median_seconds(lambda: backward(short), samples)
    ours, twice = seconds["gated, per channel"], seconds["gated, per channel, 2T"]
    flop = SHAPE["batch"] * SHAPE["heads"] * tokens * flop_per_token_and_head(SHAPE["key_dim"], SHAPE["value_dim"])
    ratios = {
        "reference over torch (at least 20)": seconds["reference"] / ours,
        "2T over T (at most 2.3)": twice / ours,
        "share of the matmul rate (goal 0.30)": flop / ours / ceiling,
        "SDPA over torch at 2T (goal above 1)": seconds["SDPA, causal, 2T"] / twice,
    }
    source = provenance({**SHAPE, "tokens": tokens, "samples": samples, "dtype": "float32"})
    shape = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in {**SHAPE, "tokens": tokens}.items())
    print(f"{shape}; fp32, {source['threads']} threads, {source['cpu']}, torch {torch.__version__}")
    print(f"a matrix product of 2048: {ceiling / 1e9:.0f} GFLOP/s; medians of {samples} calls, of the reference 3")
    for name, value in seconds.items():
        print(f"  {name:<42}{value * 1e3:10.2f} ms")
    for name, value in ratios.items():
        print(f"  {name:<42}{value:10.2f}")
    return {"seconds": seconds, "ratios": ratios, "matmul_flop_per_second": ceiling, "provenance": source}
