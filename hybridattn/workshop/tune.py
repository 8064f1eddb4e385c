"""The search for faster launch rows on the GPU at hand: what ``hybridattn kernels tune`` runs.

A row of a launch table is replaced by one candidate after the other. A workload that launches it is compared with the
fp64 reference and timed. The table is as before afterwards: the fastest are printed, and all are written as JSON. To
ship one, put it into the table, then run ``hybridattn kernels compile --record`` and ``hybridattn kernels check
--record``.
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
    """The rows of one kernel on one architecture, and how they are tried.

    Attributes:
        rows: the part of a launch table, by the dim that decides.
        candidates: what a row may be.
        workload: of ``WORKLOADS``, which launches the kernel.
        batch, tokens: of the workload.
        backward: whether it is the backward pass that launches it.
        key_dim: K; None is the row's dim. V is the row's dim, at most 256.
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
    """By kernel, for an architecture that has rows; operands are bf16."""
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
    """The shipped row and every candidate in its place: seconds where it is right, and else the reason.

    Args:
        rows: has the row at ``dim``, and has it again afterwards.
        error: of the workload with the row in place.
        seconds: that the workload takes with it.
    """
    shipped = rows[dim]
    try:
        for row in [shipped, *(each for each in candidates if each != shipped)]:
            rows[dim] = row
            line: dict[str, Any] = {"row": row, "shipped": row == shipped}
            try:
                wrong = error()
                right = wrong <= TOLERANCE[torch.bfloat16]  # NaN is not
                line |= {"seconds": seconds()} if right else {"reason": f"error {wrong:.1e}"}
            except Exception as reason:  # no room in shared memory, or a compiler that fails: on with the next
                line["reason"] = reason_of(reason)
            yield line
    finally:
        rows[dim] = shipped


def search_launches(device: str, kernels: list[str], dims: list[int], samples: int, out: Path) -> None:
    """Search, print the fastest three of every row, and append all lines to ``out``.

    Raises:
        ValueError: there is no GPU, or no such kernel.
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
    """Launch rows that were looked up are looked up again."""
    from hybridattn.kernels.flash_attention.triton import decode, operands
    from hybridattn.kernels.linear_attention.triton import decode as step
    from hybridattn.kernels.linear_attention.triton import op

    for module in (decode, operands, step, op):
        module._launch.cache_clear()


def describe(kernel: str, dim: int, lines: list[dict[str, Any]]) -> str:
    """The shipped row and the three fastest, a line each."""
    right = sorted((line for line in lines if "seconds" in line), key=lambda line: line["seconds"])
    chosen = [*right[:3], *(line for line in right[3:] if line["shipped"])]
    told = [
        f"  {line['row']!s:<24}{1e3 * line['seconds']:10.3f} ms" + ("  shipped" if line["shipped"] else "")
        for line in chosen
    ]
    return "\n".join([f"{kernel} {dim}: {len(right)} of {len(lines)} rows run and are right", *told])
