"""A probe of the CPU load: the time of a fixed matrix product before and after the samples of a benchmark.

On a shared machine, such as most virtual ones, another program on the same core can double all times. The probe tells
the reader of a report how much other programs slowed the CPU down. No figure is corrected by it.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

SIZE, PRODUCTS = 160, 10  # operands fit in a core's own cache; the products take about a millisecond
SLOW = 1.1  # the report counts probes that took more than SLOW times the fastest one


@torch.inference_mode()
def probe_seconds() -> float:
    """Measure the seconds of the fixed matrix products, on the number of threads that PyTorch is set to."""
    factor = torch.full((SIZE, SIZE), 0.5)
    product = factor @ factor  # warm-up
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(factor, factor, out=product)
    return time.perf_counter() - start


def describe_load(seconds: Sequence[float]) -> str:
    """Return a sentence on the CPU load, from the seconds of one or more probes."""
    fastest = min(seconds)
    share = sum(x > SLOW * fastest for x in seconds) / len(seconds)
    return (
        f"A fixed matrix product, timed {len(seconds):,} times before and after the samples, took "
        f"{median(seconds) / fastest:.2f} times its fastest time in the median and {max(seconds) / fastest:.2f} times "
        f"at most; {share:.0%} of its times were more than {SLOW - 1:.0%} above the fastest."
    )
