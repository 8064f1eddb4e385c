"""The search ``hybridattn kernels tune`` for faster launch rows on the GPU of this machine.

The search replaces a row of a launch table by each candidate in turn. With each it compares a workload that launches
the kernel with the fp64 reference, and times it. Afterwards the table has its original row again. The command prints
the fastest candidates and writes all of them as JSON. To ship a candidate, edit the table, then run ``hybridattn
kernels compile --record`` and ``hybridattn kernels check --record``.
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from hybridattn.kernels.flash_attention.triton.launch import DECODE, KERNELS
from hybridattn.kernels.linear_attention.triton.launch import KEYS, STEP, VALUES
from hybridattn.kernels.runtime.architectures import architecture, nearest_architecture
from hybridattn.workshop.bench import TOLERANCE
from hybridattn.workshop.gpu_timing import interleaved
from hybridattn.workshop.records import check_names, origin, reason_of, writer
from hybridattn.workshop.workloads import WORKLOADS, Shape, error_of, make_inputs

Row = tuple[int, ...]
WARPS, STAGES = (4, 8), (1, 2, 3)


class Search(NamedTuple):
    """The rows of one kernel on one architecture, the candidates for them, and the workload that times them.

    Attributes:
        rows: the part of a launch table, by dim.
        candidates: rows to be tried.
        workload: key of ``WORKLOADS``; it launches the kernel.
        batch, tokens: sizes of the workload.
        backward: whether the backward pass launches the kernel.
        key_dim: K of the workload; None takes the row's dim. V is the row's dim, at most 256.
    """

    rows: dict[int, Any]
    candidates: list[Row]
    workload: str
    batch: int
    tokens: int
    backward: bool = False
    key_dim: int | None = None

    def shape(self, dim: int) -> Shape:
        return Shape(self.batch, self.tokens, 16, self.key_dim or dim, min(dim, 256))


def searches(name: str) -> dict[str, Search]:
    """Return the search of every kernel, for an architecture with rows; operands are bf16."""
    sweep = list(product((16, 32, 64), WARPS, STAGES))
    step = list(product((16, 32, 64, 128), WARPS))
    decode = list(product((16, 32, 64, 128), WARPS, STAGES, (1, 2, 3, 4)))
    tiles = list(product((64, 128), (32, 64, 128), WARPS, STAGES))
    return {
        "linear_attention_sweep_values": Search(VALUES[name]["bf16"], sweep, "gated, per channel", 8, 4096),
        "linear_attention_sweep_keys": Search(KEYS[name]["bf16"], sweep, "gated, per channel", 8, 4096, True, 128),
        "linear_attention_step": Search(STEP[name], step, "gated step", 64, 1),
        "flash_attention_decode": Search(DECODE[name], decode, "softmax, one token", 16, 16384),
        **{
            f"flash_attention_{kernel}": Search(table[name], tiles, "softmax, causal", 8, 4096, kernel != "forward")
            for kernel, table in KERNELS.items()
        },
    }


def search(
    rows: dict[int, Any], dim: int, candidates: list[Row], error: Callable[[], float], seconds: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Try the shipped row and every candidate, and yield a JSON object for each.

    Args:
        rows: the table, whose entry at ``dim`` is replaced and finally restored.
        dim: key of the row.
        candidates: rows to be tried.
        error: returns the error of the workload with the current row.
        seconds: returns the time of the workload with the current row.

    Yields:
        ``row``, ``shipped``, and ``seconds`` if the result is correct, else ``reason``.
    """
    shipped = rows[dim]
    try:
        for row in [shipped, *(each for each in candidates if each != shipped)]:
            rows[dim] = row
            line: dict[str, Any] = {"row": row, "shipped": row == shipped}
            try:
                wrong = error()
                right = wrong <= TOLERANCE[torch.bfloat16]  # False for NaN
                line |= {"seconds": seconds()} if right else {"reason": f"error {wrong:.1e}"}
            except Exception as reason:  # too little shared memory or a compiler error: try the next one
                line["reason"] = reason_of(reason)
            yield line
    finally:
        rows[dim] = shipped


def search_launches(device: str, kernels: list[str], dims: list[int], samples: int, out: Path) -> None:
    """Search, print the three fastest candidates for every row, and append all results to ``out``.

    Args:
        device: "cuda".
        kernels, dims: kernels and keys of their launch tables; all if empty.
        samples: timed calls per candidate.
        out: file of JSON lines.

    Raises:
        ValueError: there is no GPU, or a kernel is unknown.
    """
    place = torch.device(device)
    if place.type == "cpu":
        raise ValueError("device: expected a GPU to tune on, got 'cpu'")
    known = searches(nearest_architecture(architecture(place)))
    check_names("kernel", kernels, known)
    write = writer(out, origin(place))
    for kernel in kernels or known:
        for dim in sorted(known[kernel].rows.keys() & set(dims) if dims else known[kernel].rows):
            found = _search(known[kernel], dim, place, samples)
            print(describe(kernel, dim, [write({"kernel": kernel, "dim": dim, **line}) for line in found]))


def _search(of: Search, dim: int, device: torch.device, samples: int) -> Iterator[dict[str, Any]]:
    workload = WORKLOADS[of.workload]
    x = make_inputs(workload, of.shape(dim), torch.bfloat16, device)
    leaves = [value.detach().requires_grad_(of.backward) for value in x.values()]
    do = torch.randn_like(x["v"])

    def call() -> None:
        o = workload.operator(*leaves)
        if of.backward:
            torch.autograd.grad(o, leaves, do)

    def error() -> float:
        forget()
        return error_of(workload, workload.operator, x)

    def seconds() -> float:
        return median(interleaved({"": call}, device, samples, replay=not of.backward)[""].seconds)

    yield from search(of.rows, dim, of.candidates, error, seconds)
    forget()


def forget() -> None:
    """Clear the caches of launch rows, so that the next call looks them up in the tables again."""
    from hybridattn.kernels.flash_attention.triton import decode, operands
    from hybridattn.kernels.linear_attention.triton import decode as step
    from hybridattn.kernels.linear_attention.triton import op

    for module in (decode, operands, step, op):
        module._launch.cache_clear()


def describe(kernel: str, dim: int, lines: list[dict[str, Any]]) -> str:
    """Return a line of text for each of the three fastest rows, and for the shipped row."""
    right = sorted((line for line in lines if "seconds" in line), key=lambda line: line["seconds"])
    chosen = [*right[:3], *(line for line in right[3:] if line["shipped"])]
    shown = [
        f"  {line['row']!s:<24}{1e3 * line['seconds']:10.3f} ms" + ("  shipped" if line["shipped"] else "")
        for line in chosen
    ]
    return "\n".join([f"{kernel} {dim}: {len(right)} of {len(lines)} rows run with correct results", *shown])
