"""Search of launch rows on the GPU at hand: what ``hybridattn kernels tune`` runs.

A row of a launch table is replaced by one candidate after the other; a work that launches it is compared with the fp64
reference and timed. Nothing is changed for good: the best are printed and written as JSON. Who ships one puts it into
the table, then ``hybridattn kernels compile --record`` and ``hybridattn kernels check --record``.
"""

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybridattn.kernels.flash_attention.triton.launch import DECODE, KERNELS
from hybridattn.kernels.linear_attention.triton.launch import KEYS, STEP, VALUES
from hybridattn.kernels.runtime.launch import architecture, nearest_architecture
from hybridattn.workshop.check import origin
from hybridattn.workshop.contest import TOLERANCE, WORKS, Shape, contestants, make_inputs, seconds_of, wrong_by

Row = tuple[int, ...]
WARPS, STAGES, COLUMNS = (4, 8), (1, 2, 3), (16, 32, 64)


class Search(NamedTuple):
    """Rows to be searched: those of one kernel on one architecture.

    Attributes:
        rows: the part of a launch table, by the dim that decides.
        work: of ``contest.WORKS``, which launches the kernel.
        candidates: what a row may be.
        backward: whether it is the backward pass that launches it.
        shape: of the work, from the dim.
    """

    rows: dict[int, Any]
    work: str
    candidates: list[Row]
    backward: bool
    shape: Callable[[int], Shape]


def searches(name: str) -> dict[str, Search]:
    """By kernel, for an architecture that has rows; operands are bf16."""
    tiles = [(m, n, w, s) for m, n, w, s in product((64, 128), (32, 64, 128), WARPS, STAGES)]
    linear = partial_shape(8, 4096)
    found = {
        "linear_attention_sweep_values": Search(
            VALUES[name]["bf16"], "gated, per channel", list(product(COLUMNS, WARPS, STAGES)), False, linear
        ),
        "linear_attention_sweep_keys": Search(
            KEYS[name]["bf16"],
            "gated, per channel",
            list(product(COLUMNS, WARPS, STAGES)),
            True,
            lambda dim: Shape(8, 4096, 16, 128, dim),
        ),
        "linear_attention_step": Search(
            STEP[name], "gated step", list(product((16, 32, 64, 128), WARPS)), False, partial_shape(64, 1)
        ),
        "flash_attention_decode": Search(
            DECODE[name],
            "softmax, one token",
            list(product((16, 32, 64, 128), WARPS, STAGES, (1, 2, 3, 4))),
            False,
            partial_shape(16, 16384),
        ),
    }
    for kernel, table in KERNELS.items():
        found[f"flash_attention_{kernel}"] = Search(
            table[name], "softmax, causal", tiles, kernel != "forward", partial_shape(8, 4096)
        )
    return found


def partial_shape(batch: int, tokens: int) -> Callable[[int], Shape]:
    return lambda dim: Shape(batch, tokens, 16, dim, min(dim, 256))


def search(
    rows: dict[int, Any], dim: int, candidates: list[Row], error: Callable[[], float], seconds: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """The shipped row and every candidate in its place: seconds where it is right, and else the reason.

    Args:
        rows: has the row at ``dim``, and has it again afterwards.
        error: of the work with the row in place.
        seconds: the work takes with it.
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
                line["reason"] = f"{type(reason).__name__}: {reason}"[:200]
                if "CUDA error" in line["reason"]:
                    raise ValueError(f"{row}: the GPU is lost to this process: {line['reason']}") from reason
            yield line
    finally:
        rows[dim] = shipped


def run(device: str, kernels: list[str], dims: list[int], samples: int, out: Path) -> None:
    """Search, print the fastest three of every row, and append all lines to ``out``.

    Raises:
        ValueError: there is no GPU, or no such kernel.
    """
    place = torch.device(device)
    if place.type == "cpu":
        raise ValueError("device: expected a GPU to tune on, got 'cpu'")
    known = searches(nearest_architecture(architecture(place)))
    for kernel in kernels:
        if kernel not in known:
            raise ValueError(f"kernel: expected one of {sorted(known)}, got {kernel!r}")
    source = origin(place)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for kernel in kernels or known:
            for dim in sorted(known[kernel].rows.keys() & set(dims) if dims else known[kernel].rows):
                lines = []
                for line in _search(known[kernel], dim, place, samples):
                    lines.append({"kernel": kernel, "dim": dim, **line})
                    file.write(json.dumps({**lines[-1], **source}) + "\n")
                    file.flush()
                print(describe(kernel, dim, lines))


def _search(of: Search, dim: int, device: torch.device, samples: int) -> Iterator[dict[str, Any]]:
    _, call = next(contestants(of.work, device, False))
    x = make_inputs(WORKS[of.work], of.shape(dim), torch.bfloat16, device)
    leaves = [value.detach().requires_grad_() for value in x.values()] if of.backward else list(x.values())
    do = torch.randn_like(x["v"])

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, do)

    def error() -> float:
        forget()
        return wrong_by(of.work, call, x)

    def seconds() -> float:
        if of.backward:
            return seconds_of(both, device, samples)["median"]
        return seconds_of(lambda: call(*leaves), device, samples, replay=True)["median"]

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
