"""The benchmark ``hybridattn kernels bench``: seconds of the operators, and shares of the machine's measured rates.

It first measures two rates of the machine: bytes per second of a large copy, FLOP per second of a large matrix product.
Then it times the implementations of each workload in interleaved rounds. Before that it compares their results with the
fp64 reference, and excludes wrong ones.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from hybridattn.kernels.linear_attention.chunked import CHUNK
from hybridattn.measure.provenance import provenance
from hybridattn.measure.timing import ratio, summary
from hybridattn.workshop.gpu_timing import interleaved
from hybridattn.workshop.peers import peers
from hybridattn.workshop.records import Record, origin, read, reason_of, writer
from hybridattn.workshop.workloads import COMPARED, WORKLOADS, Call, Inputs, Shape, error_of, make_inputs, work_of

OURS, GOALS = "hybridattn", "goals of a CPU"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative L2 error; rounding the operands causes less
SOFTMAX = [name for name in WORKLOADS if name.startswith("softmax")]
LINEAR = [name for name in WORKLOADS if name not in (*SOFTMAX, "gated step")]
CPU_LENGTHS, CPU_SOFTMAX_LENGTHS = (4096,), (1024,)
GPU_LENGTHS, GPU_SOFTMAX_LENGTHS = (4096, 16384, 1024, 65536), (16384, 4096, 32768, 1024)
GPU_CACHES = ((32768, 16), (524288, 1), (4096, 128), (4096, 16), (131072, 4), (32768, 1))  # tokens, batch


class Group(NamedTuple):
    """Implementations of one workload, which are timed in the same rounds."""

    workload: str
    shape: Shape
    implementations: tuple[str, ...] = (OURS,)

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """Keys of the records of the implementations: workload, implementation, sizes."""
        return [(self.workload, name, *self.shape) for name in self.implementations]


def plan(device: torch.device, lengths: Sequence[int] = (), with_peers: bool = False) -> Iterator[Group]:
    """Yield the groups that are timed on a device, at the given lengths or the default ones, in tokens."""
    for name, shape in (_gpu_shapes if device.type == "cuda" else _cpu_shapes)(lengths):
        yield Group(name, shape, (OURS, *(peers(name, device) if with_peers else ())))
    if device.type != "cuda":
        yield Group(GOALS, Shape(1, min(lengths or CPU_LENGTHS), 4, 64, 64))


def _cpu_shapes(lengths: Sequence[int]) -> Iterator[tuple[str, Shape]]:
    for usual, names in ((CPU_LENGTHS, LINEAR), (CPU_SOFTMAX_LENGTHS, SOFTMAX)):
        for tokens, name in product(lengths or usual, names):
            yield name, Shape(1, tokens, 4, WORKLOADS[name].key_dim or 64, 64)
    yield "gated step", Shape(8, 1, 4, 64, 64)


def _gpu_shapes(lengths: Sequence[int]) -> Iterator[tuple[str, Shape]]:
    """Yield workloads and shapes, the most important first; every length has about the same number of tokens."""
    for tokens, name in product(lengths or GPU_LENGTHS, LINEAR):
        yield name, Shape(max(1, 32768 // tokens), tokens, 16, WORKLOADS[name].key_dim or 128, 128)
    for batch in (64, 256, 1):
        yield "gated step", Shape(batch, 1, 16, 128, 128)
    for heads, dim in ((16, 128), (32, 64)):
        for tokens, name in product(lengths or GPU_SOFTMAX_LENGTHS, ("softmax, causal", "softmax, full")):
            yield name, Shape(max(1, 32768 // tokens), tokens, heads, dim, dim)
        for name in ("softmax, window 512", "softmax, window 4096"):
            yield name, Shape(1, max(lengths or (32768,)), heads, dim, dim)
    for tokens, batch in [(tokens, max(1, 524288 // tokens)) for tokens in lengths] or GPU_CACHES:
        yield "softmax, one token", Shape(batch, tokens, 16, 128, 128)


def ceilings(device: torch.device, dtype: torch.dtype, samples: int) -> dict[str, float]:
    """Measure bytes per second (read and written) of a large copy, and FLOP per second of a large matrix product."""
    elements, size = (1 << 29, 8192) if device.type == "cuda" else (1 << 25, 2048)
    # Random data: hardware may copy zeros faster.
    a = torch.randint(256, (elements,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed = interleaved({"copy": lambda: b.copy_(a), "matmul": lambda: x @ y}, device, samples)
    copy, matmul = (median(each.seconds) for each in timed.values())
    return {"copy_bytes_per_second": 2 * elements / copy, "matmul_flop_per_second": 2 * size**3 / matmul}


def measure(
    group: Group, dtype: torch.dtype, device: torch.device, most: dict[str, float], samples: int
) -> list[Record]:
    """Measure a group.

    Args:
        group: the workload, its shape and implementations.
        dtype, device: of the inputs.
        most: rates of the machine, from ``ceilings``.
        samples: number of rounds.

    Returns:
        A record per implementation: its figures, or the ``reason`` why there are none.
    """
    workload = WORKLOADS[group.workload]
    x = make_inputs(workload, group.shape, dtype, device)
    known = {OURS: workload.operator, **(peers(group.workload, device) if len(group.implementations) > 1 else {})}
    records: dict[str, Record] = {name: {} for name in group.implementations}
    for name, record in records.items():
        try:
            record["error"] = error_of(workload, known[name], x)
        except Exception as reason:  # an implementation may lack a case; the others still run
            record["reason"] = reason_of(reason)
            continue
        if not record["error"] <= TOLERANCE[dtype]:  # also for NaN
            record["reason"] = f"error {record['error']:.1e} against the reference, limit {TOLERANCE[dtype]:.0e}"
    calls = {name: known[name] for name, record in records.items() if "reason" not in record}
    for name, found in _figures(group, calls, x, device, samples, records).items():
        records[name] |= found
        for unit, ceiling in (("bytes", "copy"), ("flop", "matmul")):
            share = found[f"{unit}_per_second"] / most[f"{ceiling}_{unit}_per_second"]
            records[name][f"share_of_{ceiling}"] = share
    return list(records.values())


def _figures(
    group: Group, calls: dict[str, Call], x: Inputs, device: torch.device, samples: int, records: dict[str, Record]
) -> dict[str, dict[str, Any]]:
    """Return seconds of the passes, rates of the forward pass, and peak bytes on a GPU, by implementation.

    An implementation that fails gets a ``reason`` in its record and keeps the figures measured before.
    """
    workload = WORKLOADS[group.workload]
    with torch.inference_mode():
        runs = _without_failures({name: partial(call, *x.values()) for name, call in calls.items()}, records)
        found = _timed("forward", runs, device, samples, replay=True)
    flop, moved = work_of(workload, group.shape, x)
    for each in found.values():
        seconds = each["forward"]["median"]
        each |= {"bytes_per_second": moved / seconds, "flop_per_second": flop / seconds}
    if workload.kind != "sequence":
        return found
    leaves = [value.detach().requires_grad_() for value in x.values()]
    do = torch.randn_like(x["v"])

    def both(call: Call) -> None:
        torch.autograd.grad(call(*leaves), leaves, do)

    runs = _without_failures({name: partial(both, calls[name]) for name in found}, records)
    for name, each in _timed("forward_backward", runs, device, samples).items():
        found[name] |= each
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            runs[name]()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def _without_failures(runs: dict[str, Any], records: dict[str, Record]) -> dict[str, Any]:
    """Return the runs that raise no error when called once; add the ``reason`` to the records of the others."""
    fine = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as reason:
            records[name]["reason"] = reason_of(reason)
        else:
            fine[name] = run
    return fine


def _timed(what: str, runs: dict[str, Any], device: torch.device, samples: int, **options: bool) -> dict[str, Any]:
    """Time runs and return, by name and under the key ``what``, median and quartiles of the seconds.

    Other implementations also get ``over_ours``, the ratio of their seconds to ours within a round.
    """
    timed = interleaved(runs, device, samples, **options)
    found = {}
    for name, (seconds, in_graph) in timed.items():
        found[name] = {what: {**_summary(seconds), "in_graph": in_graph}}
        if name != OURS and OURS in timed:
            found[name][what]["over_ours"] = ratio(seconds, timed[OURS].seconds)
    return found


def _summary(seconds: list[float]) -> dict[str, Any]:
    """Summarise samples, one per round."""
    return summary({str(turn): [each] for turn, each in enumerate(seconds)})


def measure_goals(shape: Shape, samples: int) -> Record:
    """Measure the ratios for which DESIGN.md sets goals on a CPU: gated linear attention at T = shape.tokens and 2T."""
    workload, cpu, size = WORKLOADS["gated, per channel"], torch.device("cpu"), 2048
    sizes = (shape, shape._replace(tokens=2 * shape.tokens))
    short, long = (make_inputs(workload, each, torch.float32, cpu) for each in sizes)
    wrong = error_of(workload, workload.operator, short)
    if not wrong <= TOLERANCE[torch.float32]:
        return {"reason": f"error {wrong:.1e} against the reference"}
    q, k, v = (long[name].transpose(1, 2).contiguous() for name in "qkv")
    a = torch.randn(size, size)
    runs = {
        "torch": partial(workload.operator, *short.values()),
        "torch at 2T": partial(workload.operator, *long.values()),
        "reference": partial(workload.operator, *short.values(), backend="reference"),
        "SDPA at 2T": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "matrix product": lambda: a @ a,
    }
    with torch.inference_mode():
        seconds = {name: each.seconds for name, each in interleaved(runs, cpu, samples).items()}
    flop, _ = work_of(workload, shape, short)
    ours, twice = seconds["torch"], seconds["torch at 2T"]
    rate = [x * flop / (2 * size**3) for x in seconds["matrix product"]]
    ratios = {
        "reference over torch (goal: at least 20)": ratio(seconds["reference"], ours),
        "2T over T (goal: at most 2.3)": ratio(twice, ours),
        "share of the matmul rate (goal: 0.30)": ratio(rate, ours),
        "SDPA over torch at 2T (goal: above 1)": ratio(seconds["SDPA at 2T"], twice),
    }
    return {"ratios": ratios, "seconds": {name: _summary(each) for name, each in seconds.items()}}


def run_benchmark(
    device: str,
    with_peers: bool = False,
    samples: int = 15,
    lengths: Sequence[int] = (),
    out: Path = Path("reports/bench.jsonl"),
    plot: Path | None = None,
) -> list[Record]:
    """Run the benchmark, print the results, and append the records to ``out``.

    Args:
        device: "cuda" or "cpu".
        with_peers: also time implementations of PyTorch and, if installed, of flash-linear-attention.
        samples: number of rounds, at least 3.
        lengths: tokens of sequences and caches, at least 64 each; if empty, default lengths that include those of the
            performance goals.
        out: file of JSON lines. A workload is not measured again if the file has records of all its implementations
            with the same code, versions, device and configuration.
        plot: image file for a roofline plot of the records, or None.

    Returns:
        The records of all requested workloads, including those that ``out`` had already.

    Raises:
        ValueError: an argument is not as above, or ``plot`` is given and matplotlib is not installed.
    """
    if samples < 3 or min(lengths, default=CHUNK) < CHUNK:
        raise ValueError(
            f"samples, tokens: expected samples >= 3 and tokens >= {CHUNK}, got samples={samples}, "
            f"tokens={list(lengths)}"
        )
    if plot is not None and not find_spec("matplotlib"):
        raise ValueError("plot: expected matplotlib, which is not installed; pip install hybridattn[demo]")
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    facts = provenance({"dtype": str(dtype), "samples": samples, "compared": COMPARED, "tolerance": TOLERANCE[dtype]})
    source = {**origin(place), **{name: facts[name] for name in ("versions", "threads", "config_sha256")}}
    known = {(line["workload"], line["implementation"], *line["shape"]): line for line in read(out, source)}
    groups = list(plan(place, lengths, with_peers))
    todo = [group for group in groups if not known.keys() >= set(group.keys)]
    print(f"{source['device']}, {facts['threads']} threads, {str(dtype)[6:]}, torch {source['torch']}")
    print(f"{samples} rounds; {out} already has {len(groups) - len(todo)} of {len(groups)} workloads")
    most = ceilings(place, dtype, samples) if todo else {}
    if most:
        copy, matmul = (value / 1e9 for value in most.values())
        print(f"copy {copy:.0f} GB/s, matrix product {matmul:.0f} GFLOP/s")
    write = writer(out, {**source, "date": facts["date"], **most})
    for group in groups:
        if group in todo and group.workload == GOALS:
            found = [measure_goals(group.shape, samples)]
        else:
            found = measure(group, dtype, place, most, samples) if group in todo else []
        for key, name, record in zip(group.keys, group.implementations, found, strict=bool(found)):
            known[key] = write({"workload": group.workload, "implementation": name, "shape": group.shape, **record})
        for key in group.keys:
            print(describe(known[key]), flush=True)
    records = [known[key] for group in groups for key in group.keys]
    if plot is not None:
        from hybridattn.workshop.roofline import roofline

        roofline(records, plot)
    return records


def describe(record: Record) -> str:
    """Return lines of text: milliseconds with quartiles, shares of the machine's rates, and ratios with their range."""
    title = f"  {record['workload']:<21}{'x'.join(map(str, record['shape'])):<18}{record['implementation']:<16}"
    if "reason" in record:
        return title + record["reason"]
    if record["workload"] == GOALS:
        seconds = [f"    {name:<42}{_milliseconds(each)}" for name, each in record["seconds"].items()]
        return "\n".join(
            [title.rstrip(), *seconds, *(f"    {name:<42}{_range(x)}" for name, x in record["ratios"].items())]
        )
    forward = record["forward"]
    text = _milliseconds(forward)
    text += f", {record['share_of_copy']:4.0%} of copy, {record['share_of_matmul']:4.0%} of matmul"
    if "forward_backward" in record:
        text += f"; with backward {_milliseconds(record['forward_backward'])}"
    text += f"; peak {record['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in record else ""
    is_single = record["architecture"] != "cpu" and not forward["in_graph"]
    return title + text + ("; not in a CUDA graph" if is_single else "")


def _milliseconds(timed: dict[str, Any]) -> str:
    middle, low, high = (1e3 * timed[name] for name in ("median", "lower_quartile", "upper_quartile"))
    text = f"{middle:9.3f} ms ({low:.3f} to {high:.3f})"
    return text + (f", {_range(timed['over_ours'])} times ours" if "over_ours" in timed else "")


def _range(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
