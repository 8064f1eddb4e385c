"""The check ``hybridattn kernels compile``: compiles every launch row without a GPU and compares it with ceilings.

The machine code and its metadata give the figures per thread: registers, spill instructions (local loads and stores),
spilled bytes. They also give bytes of shared memory and columns of tensor memory (sm_100) per program, and the numbers
of matrix and TMA instructions. ``ceilings.json`` holds a ceiling for each figure. The ceilings belong to one version of
Triton, since the figures depend on its compiler.
"""

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from hybridattn.kernels.runtime.architectures import SHARED_MEMORY, CompileRow
from hybridattn.workshop.records import check_names

FAMILIES = (
    "linear_attention",
    "flash_attention",
)  # each has ``triton/compile_cases.py``
CEILINGS = Path(__file__).with_name("ceilings.json")
HELD = ("registers", "spill_instructions", "spilled_bytes", "shared_memory")  # figures that may not rise
TENSOR_MEMORY = 512  # columns of tensor memory of an sm_100 multiprocessor; other architectures have none
PRESENT = ("matrix", "tma")  # counts of instructions that may not become 0
NVIDIA_TOOLS = Path(triton.__file__).with_name("backends") / "nvidia" / "bin"

Figures = dict[str, Any]


def shipped_rows(architectures: Sequence[str] = (), kernels: Sequence[str] = ()) -> dict[str, list[CompileRow]]:
    """Return the rows of the named kernels by architecture; all kernels or architectures if none is named.

    Raises:
        ValueError: an architecture or a kernel is unknown.
    """
    check_names("arch", architectures, SHARED_MEMORY)
    modules = [import_module(f"hybridattn.kernels.{family}.triton.compile_cases") for family in FAMILIES]
    rows = {
        name: [row for module in modules for row in module.compile_rows(name)]
        for name in architectures or SHARED_MEMORY
    }
    known = sorted({kernel_name(row.name) for each in rows.values() for row in each})
    check_names("kernel", kernels, known)
    chosen = kernels or known
    return {name: [row for row in each if kernel_name(row.name) in chosen] for name, each in rows.items()}


def kernel_name(row: str) -> str:
    """Return the name of a row's kernel."""
    return row.partition(" ")[0]


def measure(row: CompileRow, architecture: str) -> Figures:
    """Compile a row without any cache, and return its figures.

    Raises:
        ValueError: TRITON_INTERPRET=1 is set, so the kernel cannot be compiled.
    """
    if not isinstance(row.kernel, JITFunction):
        raise ValueError(f"{row.name}: expected a compilable kernel, got an interpreted one; unset TRITON_INTERPRET")
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder  # pyright: ignore[reportAttributeAccessIssue]
        knobs.compilation.always_compile = True  # pyright: ignore[reportAttributeAccessIssue]
        start = time.perf_counter()
        compiled = triton.compile(_source(row), target=target, options=options)
        seconds = time.perf_counter() - start
        is_cuda = target.backend == "cuda"
        figures = _cubin_figures(compiled, Path(folder)) if is_cuda else _amdgcn_figures(compiled.asm["amdgcn"])
    metadata = compiled.metadata
    memory = {"shared_memory": metadata.shared, "tensor_memory": getattr(metadata, "tmem_size", None) or 0}
    return {**figures, **memory, "seconds": round(seconds, 2)}


def _source(row: CompileRow) -> ASTSource:
    """Return the row as a source for the compiler, specialised like the JIT's: on ones and on divisibility by 16."""
    signature, constants, attributes = {}, {}, {}

    def specialised(place: tuple[int, ...], kind: str) -> str:
        kind, _, known = kind.partition(":")
        if known == "1":
            constants[place] = 1
            return "constexpr"
        if known == "16":
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    for place, name in enumerate(row.kernel.arg_names):
        if name in row.constexprs:
            signature[name], constants[place,] = "constexpr", row.constexprs[name]
        elif isinstance(kind := row.signature[name], tuple):
            signature[name] = tuple(specialised((place, n), part) for n, part in enumerate(kind))
        else:
            signature[name] = specialised((place,), kind)
    return ASTSource(row.kernel, signature, constants, attributes)


def _cubin_figures(compiled: CompiledKernel, folder: Path) -> Figures:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _output("cuobjdump", "-res-usage", cubin)
    code = _output("nvdisasm", "-c", cubin)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources, usage
    return {
        "registers": int(resources[1]),
        "spill_instructions": _count(r"(?:STL|LDL)", code),
        "spilled_bytes": int(resources[2]),
        "matrix": _count(r"(?:HGMMA|HMMA|UTC[A-Z]*MMA)", code),
        "tma": _count(r"(?:UTMALDG|UTMASTG)", code),
    }


def _output(tool: str, *arguments: Any) -> str:
    command = [NVIDIA_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amdgcn_figures(code: str) -> Figures:
    def named(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found, key
        return int(found[1])

    return {
        "registers": named("vgpr_count"),
        "spill_instructions": _count(r"scratch_(?:load|store)\w*", code),
        "spilled_bytes": named("private_segment_fixed_size"),
        "matrix": _count(r"v_mfma_\w+", code),
        "tma": 0,
    }


def _count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


# ------------------------------------------------------------------------------------------------------------- ceilings
def read_ceilings(file: Path = CEILINGS) -> dict[str, Any]:
    """Read the ceilings as ``{"triton": version, "rows": {architecture: {row: figures}}}``.

    A file that does not exist has no rows, for the installed version of Triton.
    """
    return json.loads(file.read_text()) if file.exists() else {"triton": triton.__version__, "rows": {}}


def complaints(architecture: str, figures: Figures, ceiling: Figures | None) -> list[str]:
    """Return a message for every figure that exceeds the architecture's limit or the ceiling."""
    found = []
    limit = SHARED_MEMORY[architecture]
    if figures["shared_memory"] > limit:
        found.append(f"shared memory {figures['shared_memory']} is over the architecture's {limit}")
    if figures["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"tensor memory {figures['tensor_memory']} is over the architecture's {TENSOR_MEMORY}")
    if ceiling is None:
        return [*found, "no ceiling recorded; --record adds it"]
    found += [f"{name} {figures[name]} is over {ceiling[name]}" for name in HELD if figures[name] > ceiling[name]]
    found += [
        f"no {name} instructions, the ceiling has {ceiling[name]}"
        for name in PRESENT
        if ceiling[name] > figures[name] == 0
    ]
    return found


def recorded(ceiling: Figures | None, figures: Figures, may_rise: bool) -> Figures:
    """Return the new ceiling of a row: the lower figures; with ``may_rise``, or for a new row, all figures."""
    if ceiling is None or may_rise:
        return {name: figures[name] for name in (*HELD, *PRESENT)}
    return {name: min(ceiling[name], figures[name]) for name in HELD} | {
        name: figures[name] or ceiling[name] for name in PRESENT
    }


def check_compilation(
    architectures: Sequence[str] = (),
    kernels: Sequence[str] = (),
    record: bool = False,
    may_rise: bool = False,
    file: Path = CEILINGS,
) -> bool:
    """Compile the rows, print a line for each, and compare with the ceilings.

    Args:
        architectures, kernels: names; all if empty.
        record: lower the ceilings that are higher than the figures, and add those of new rows.
        may_rise: let ``record`` also raise ceilings.
        file: file of the ceilings.

    Returns:
        Whether every row has a ceiling and is within it and the architecture's limits, after recording.

    Raises:
        ValueError: a name is unknown, or ``record`` with another version of Triton would mix its figures with old ones.
    """
    ceilings, clean = read_ceilings(file), True
    rows = shipped_rows(architectures, kernels)
    if ceilings["triton"] != triton.__version__:
        print(f"the ceilings belong to Triton {ceilings['triton']}; {triton.__version__} is installed")
        if record and not (may_rise and not architectures and not kernels):
            raise ValueError(
                f"record: expected Triton {ceilings['triton']}, got {triton.__version__}; "
                "record all rows anew with --may-rise and without --arch and --kernel"
            )
    names = (*HELD, "tensor_memory", *PRESENT, "seconds")
    print(f"{'':<52}" + "".join(f"{name.replace('_', ' '):>20}" for name in names))
    for architecture, each in rows.items():
        held = ceilings["rows"].setdefault(architecture, {})
        if record and not kernels:  # rows that are no longer shipped
            for name in held.keys() - {row.name for row in each}:
                del held[name]
        for row in each:
            figures = measure(row, architecture)
            print(f"{architecture:<8}{row.name:<44}" + "".join(f"{figures[name]:>20}" for name in names), flush=True)
            if record:
                held[row.name] = recorded(held.get(row.name), figures, may_rise)
            for complaint in complaints(architecture, figures, held.get(row.name)):
                clean = False
                print(f"        {complaint}")
    if record:
        file.write_text(json.dumps({"triton": triton.__version__, "rows": ceilings["rows"]}, indent=1) + "\n")
    return clean
