"""How busy the CPU is: the time of a small fixed matrix product, taken before and after the samples of a benchmark.

On a shared machine, which most virtual ones are, another program on the same core makes everything up to twice as slow.
The probe tells a reader of a report how far other programs slowed the CPU down. It changes no figure.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

SIZE, PRODUCTS = 160, 10  # operands fit into a core's own cache; about a millisecond of work
SLOW = 1.1  # times the fastest probe, from which the report counts the CPU as disturbed


@torch.inference_mode()
def probe_seconds() -> float:
    """Seconds that the fixed work takes now, on as many threads as PyTorch is set to use."""
    factor = torch.full((SIZE, SIZE), 0.5)
    product = factor @ factor  # warm-up
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(factor, factor, out=product)
    return time.perf_counter() - start


def describe_load(seconds: Sequence[float]) -> str:
    """One sentence on how disturbed the machine was, from the seconds of its probes (one or more)."""
    fastest = min(seconds)
    share = sum(x > SLOW * fastest for x in seconds) / len(seconds)
    return (
        f"A fixed matrix product, timed {len(seconds):,} times before and after the samples, took "
        f"{median(seconds) / fastest:.2f} times its fastest time in the median and {max(seconds) / fastest:.2f} times "
        f"at most; {share:.0%} of its times were more than {SLOW - 1:.0%} above the fastest."
    )
