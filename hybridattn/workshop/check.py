"""The check ``hybridattn kernels check``: compares operators and launch rows with the fp64 reference on one device.

It compares results and gradients in fp32, bf16 and fp16, at the sizes of module ``cases``. Uninitialised memory is NaN.
Every case runs twice and has to give the same bits. In Triton's interpreter the second run executes the programs in
reverse order. Each case is one line of JSON, so that an interrupted run can be continued.
"""

import json
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridattn.measure.provenance import PACKAGE
from hybridattn.workshop.cases import DTYPES, OPERATORS, Sizes, make_inputs, sizes_of
from hybridattn.workshop.records import check_names, origin, read, reason_of, writer

EXACT, EXACT_GRADIENT = 1e-5, 1e-4  # limits of the relative L2 error in fp32
ROUNDING, ROUNDING_GRADIENT = 1.5, 2.0  # 16-bit limits: times the error of the fp64 formula with rounded operands
DRAWS = 8  # inputs whose errors are combined: see ``_draws_of_constant_gates``
FAR = (1 << 31) + 64  # elements between batch rows: more than a 32-bit offset can address


class Case(NamedTuple):
    """One operator on one backend at given sizes and dtype: one line of the output."""

    operator: str
    backend: str
    dtype: torch.dtype
    sizes: Sizes

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.backend}, {str(self.dtype).removeprefix('torch.')}, {self.sizes}"


def cases(device: torch.device, kernels: Sequence[str] = (), backends: Sequence[str] = ()) -> list[Case]:
    """Return the cases of a device, of the named operators and backends or of all.

    Raises:
        ValueError: an operator or a backend is unknown, or "triton" was requested on a CPU without its interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    known = sorted({name.partition(" ")[0] for name in OPERATORS})
    check_names("kernel", kernels, known)
    check_names("backend", backends, ("torch", "triton"))
    if "triton" in backends and device.type == "cpu" and not interpreted:
        raise ValueError("backend: expected 'torch' on a CPU without TRITON_INTERPRET=1, got 'triton'")
    wanted = backends or (["torch", "triton"] if device.type != "cpu" or interpreted else ["torch"])
    return [
        Case(name, backend, dtype, sizes)
        for name, operator in OPERATORS.items()
        for backend in wanted
        for dtype in DTYPES
        for sizes in sizes_of(name, device.type != "cpu")
        if name.partition(" ")[0] in (kernels or known) and (backend != "triton" or operator.rows)
    ]


def has_row(case: Case, architecture: str) -> bool:
    """Return whether the architecture has a launch row for the case; the interpreter on a CPU runs every case."""
    rows = OPERATORS[case.operator].rows
    if case.backend != "triton" or architecture == "cpu" or rows is None:
        return True
    return bool(rows(architecture, case.sizes, case.dtype))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, by means of torch's deterministic algorithms.

    Ignores their warnings about operations that are not deterministic, and the warnings about launch rows.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        warnings.filterwarnings("ignore", message="launch row .* was compiled for|no launch rows for")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _opposite_order() -> AbstractContextManager[None]:
    from hybridattn.workshop.interpreter_bf16 import reversed_programs

    return reversed_programs()


def far_apart(x: Tensor) -> Tensor:
    """Return a copy of x whose batch rows are FAR elements apart."""
    memory = x.new_empty(FAR * (x.shape[0] - 1) + x[0].numel())
    return memory.as_strided(x.shape, (FAR, *x[0].contiguous().stride())).copy_(x)


def evaluate(
    case: Case, inputs: dict[str, Tensor], backend: str, dtype: torch.dtype, rounded: bool = False
) -> dict[str, Tensor]:
    """Run a case and return results and gradients by name.

    Args:
        case: the case.
        inputs: tensors by name.
        backend: the backend to run, which may differ from the case's.
        dtype: dtype of the operands. States, and gates with one number per head, are fp32 or wider.
        rounded: first round the operands, and the gradient of o, to the case's dtype.
    """
    operator = OPERATORS[case.operator]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {}
    for name, value in inputs.items():
        keeps = name == "state" or value.dim() == 1
        x[name] = (value.to(case.dtype) if rounded and not keeps else value).to(wide if keeps else dtype, copy=True)
    if case.sizes.far and backend != "reference":
        x[case.sizes.far] = far_apart(x[case.sizes.far])
    if not operator.backward:
        with torch.no_grad():
            return operator.call(x, backend)
    x = {name: value.requires_grad_() for name, value in x.items()}
    results = operator.call(x, backend)
    generator = torch.Generator(inputs["q"].device).manual_seed(1)
    given = []
    for name, y in results.items():
        dy = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float64)
        given.append((dy.to(case.dtype) if rounded and name == "o" else dy).to(y.dtype))
    gradients = torch.autograd.grad(list(results.values()), list(x.values()), given)
    named = {f"d{name}": gradient for name, gradient in zip(x, gradients, strict=True)}
    return {name: y.detach() for name, y in results.items()} | named


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; the absolute one if ``expected`` is zero."""
    norm = expected.double().norm()
    distance = (actual.double() - expected.double()).norm()
    return (distance / norm if norm > 0 else distance).item()


def run_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Run a case and return, as JSON values, whether it passed and the result with the largest error over its limit."""
    start = time.perf_counter()
    operator, seed = OPERATORS[case.operator], zlib.crc32(case.name.encode())
    inputs = make_inputs(operator, case.sizes, device, seed)
    exact = evaluate(case, inputs, "reference", torch.float64)
    with poisoned():
        first = evaluate(case, inputs, case.backend, case.dtype)
        with _opposite_order() if case.backend == "triton" and device.type == "cpu" else nullcontext():
            again = evaluate(case, inputs, case.backend, case.dtype)
    same_bits = all(torch.equal(y, again[name]) for name, y in first.items())
    if case.dtype == torch.float32:
        limits = {name: EXACT_GRADIENT if name.startswith("d") else EXACT for name in exact}
    else:
        formula = evaluate(case, inputs, "reference", torch.float64, rounded=True)
        if operator.gate == "H" and operator.backward:
            draws = [(exact["dg"], first["dg"], formula["dg"]), *_draws_of_constant_gates(case, inputs, seed)]
            exact["dg"], first["dg"], formula["dg"] = map(torch.stack, zip(*draws, strict=True))
        limits = {
            name: (ROUNDING_GRADIENT if name.startswith("d") else ROUNDING)
            * error(y.to(first[name].dtype), exact[name])
            for name, y in formula.items()
        }
    errors = {name: error(first[name], y) for name, y in exact.items()}
    worst = max(errors, key=lambda name: errors[name] / max(limits[name], EXACT))
    right = all(errors[name] <= max(limits[name], EXACT) for name in errors)  # NaN is not right
    return {
        "passed": right and same_bits,
        "worst": worst,
        "error": errors[worst],
        "limit": max(limits[worst], EXACT),
        "same_bits": same_bits,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _draws_of_constant_gates(
    case: Case, inputs: dict[str, Tensor], seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield dg exact, dg of the backend and dg of rounded operands, for the same gates and other random inputs.

    The gradient of constant gates has one number per head. In a single draw the rounding error of so few numbers may be
    nearly 0 by chance, and the limit with it. So errors and limits are computed over DRAWS draws together.
    """
    for n in range(1, DRAWS):
        x = make_inputs(OPERATORS[case.operator], case.sizes, inputs["q"].device, seed + n) | {"g": inputs["g"]}
        exact = evaluate(case, x, "reference", torch.float64)
        with poisoned():
            actual = evaluate(case, x, case.backend, case.dtype)
        yield exact["dg"], actual["dg"], evaluate(case, x, "reference", torch.float64, rounded=True)["dg"]


def check_operators(
    device: str,
    out: Path,
    kernels: Sequence[str] = (),
    backends: Sequence[str] = (),
    record: bool = False,
) -> bool:
    """Run the cases and print the failed ones.

    Args:
        device: "cuda" or "cpu".
        out: file of JSON lines, one per case. A case with a line of the same code, versions and device is not run
            again.
        kernels, backends: names; all if empty.
        record: mark a launch row of this GPU's architecture as verified if all of its cases have passed.

    Returns:
        Whether all cases passed, including those of earlier runs.

    Raises:
        ValueError: a name is unknown, or ``record`` without a GPU.
    """
    place = torch.device(device)
    if record and place.type == "cpu":
        raise ValueError("record: expected a GPU, got the CPU")
    source = origin(place)
    known = {line["case"]: line for line in read(out, source)}
    todo = [case for case in cases(place, kernels, backends) if has_row(case, source["architecture"])]
    write = writer(out, source)
    with ExitStack() as stack:
        if place.type == "cpu" and any(case.backend == "triton" for case in todo):
            from hybridattn.workshop.interpreter_bf16 import exact_bf16

            stack.enter_context(exact_bf16())
        for case in todo:
            if case.name not in known:
                known[case.name] = write({"case": case.name, **_attempt(case, place)})
            if not known[case.name]["passed"]:
                print(_failure(known[case.name]))
    failed = [case for case in todo if not known[case.name]["passed"]]
    print(f"{len(todo) - len(failed)} of {len(todo)} cases passed on {source['device']}")
    if record:
        passed = {name for name, line in known.items() if line["passed"]}
        verify(source, passed, place)
    return not failed


def _attempt(case: Case, device: torch.device) -> dict[str, Any]:
    try:
        return run_case(case, device)
    except Exception as reason:  # a kernel may fail in any way; the other cases still run
        return {"passed": False, "reason": reason_of(reason)}


def _failure(line: dict[str, Any]) -> str:
    if "reason" in line:
        return f"FAILED {line['case']}: {line['reason']}"
    bits = "" if line["same_bits"] else "; the second run gave other bits"
    return f"FAILED {line['case']}: error {line['error']:.2e} of {line['worst']}, limit {line['limit']:.2e}{bits}"


def verify(source: dict[str, Any], passed: set[str], device: torch.device, folder: Path = PACKAGE / "kernels") -> None:
    """Update ``verified.json`` of every family: add rows whose cases have all passed, remove other rows.

    Args:
        source: device and versions of the check, from ``records.origin``.
        passed: names of the passed cases.
        device: the GPU.
        folder: the folder with the families.
    """
    name = source["architecture"]
    rows: dict[str, dict[str, bool]] = {}
    for case in cases(device, backends=["triton"]):
        operator = OPERATORS[case.operator]
        for row in operator.rows(name, case.sizes, case.dtype) if operator.rows else ():
            of_family = rows.setdefault(operator.family, {})
            of_family[row] = of_family.get(row, True) and case.name in passed
    for family, found in rows.items():
        file = folder / family / "triton" / "verified.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[name] = {row: source for row, right in sorted(found.items()) if right}
        file.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{family}: {len(kept[name])} of {len(found)} launch rows are verified on {name}")
