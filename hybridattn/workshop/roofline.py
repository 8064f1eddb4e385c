"""The roofline plot of ``hybridattn kernels bench --plot``: operators' FLOP rates below the machine's limits."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from hybridattn.workshop.records import Record

COLORS = ("#3b82d0", "#d9772b", "#2f9e58", "#d6455d", "#9467bd", "#a0785a", "#d664b4", "#8a8a8a", "#a3a022", "#20a8b8")
MARKERS = "osD^vP*Xph"


def roofline(records: Sequence[Record], file: Path) -> None:
    """Plot FLOP per second over FLOP per byte: a point per forward pass, and the limits of copy and matrix product.

    Args:
        records: records of the benchmark, of one device; records without figures have no point.
        file: the image file; its suffix decides the format.
    """
    right = [record for record in records if "flop_per_second" in record and "reason" not in record]
    workloads, implementations = (
        list(dict.fromkeys(r[name] for r in right)) for name in ("workload", "implementation")
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # A continued run has measured the two rates several times.
    copy, product = (median(r[name] for r in right) for name in ("copy_bytes_per_second", "matmul_flop_per_second"))
    intensities = [record["flop_per_second"] / record["bytes_per_second"] for record in right]
    low, high = min([*intensities, product / copy]) / 3, max([*intensities, product / copy]) * 3
    axes.plot([low, product / copy, high], [low * copy, product, product], color="black", linewidth=1.2)
    for record, intensity in zip(right, intensities, strict=True):
        color = COLORS[workloads.index(record["workload"]) % len(COLORS)]
        marker = MARKERS[implementations.index(record["implementation"]) % len(MARKERS)]
        axes.scatter(intensity, record["flop_per_second"], color=color, marker=marker, s=30)
    for i, name in enumerate(workloads):
        axes.scatter([], [], color=COLORS[i % len(COLORS)], label=name)
    for i, name in enumerate(implementations):
        axes.scatter([], [], color="black", marker=MARKERS[i % len(MARKERS)], label=name)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte that must move", ylabel="useful FLOP per second")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
