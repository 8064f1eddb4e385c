"""Draw a report's plots, for PNG files and for the HTML page.

Text and lines have one color, which `svg` replaces by the page's text color. The colors of series have enough contrast
on white and on black.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from hybridattn.evals.report.fronts import front, place_labels

INK = "#123456"  # placeholder color of text and lines, which `svg` replaces
COLORS = ("#3b82d0", "#d9772b", "#2f9e58", "#d6455d", "#9467bd", "#a0785a", "#d664b4", "#8a8a8a", "#a3a022", "#20a8b8")
MARKERS = "osD^vP*Xph"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridattn",
    "text.parse_math": False,  # a model's name may contain dollar signs
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "legend.labelcolor": INK,
}


def plots(rows: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Draw the plots that there are measurements for; by name, ``pareto``, ``scaling`` and ``learnability``."""
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        if points:
            drawn["pareto"] = pareto(points)
        if any(row["prefill_exponent"] is not None for row in rows):
            drawn["scaling"] = scaling(rows)
        if any(len(curve) > 1 for row in rows for curve in row["curves"]):
            drawn["learnability"] = curves(rows)
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a white background."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, facecolor="white")


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element with a transparent background and the page's text color and font."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = f"{figure.get_figwidth() * 100:.0f}px"
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', rf'<svg \1style="width: {width}"', text, count=1)


def _figure(count: int, width: float = 5.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.2)
        each.set_facecolor("none")
    return figure, axes


def _log(axes: Axes, *names: str) -> None:
    """Make axes logarithmic, with labels such as 2k instead of powers of ten."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(EngFormatter(sep=""))


def _same(points: Sequence[dict[str, Any]], name: str, text: str, otherwise: str = "") -> str:
    """Format the value that all points share; return ``otherwise`` if it differs, as where memory ran out for some."""
    values = {point[name] for point in points}
    return text.format(*values) if len(values) == 1 else otherwise


def pareto(points: Sequence[dict[str, Any]]) -> Figure:
    """Plot recall against state bytes and against decoded tokens per second, with dashed Pareto fronts."""
    figure, axes = _figure(2)
    recalls = [point["recall"] for point in points]
    steps = [round(recall, 3) for recall in recalls]  # recall is a share of a few thousand answers: 3 digits are exact
    first = points[0]
    states = [point["state_bytes"] for point in points]
    rates = [point["tokens_per_second"] for point in points]
    best_states = front(states, steps)
    panels = (
        (f"state{_same(points, 'state_tokens', ' after {:,} tokens')}, bytes (less is better)", states, best_states),
        (
            f"decode, tokens/s{_same(points, 'batch', ' at batch {:,}', ' at the largest batch')}"
            f"{_same(points, 'context', ' after {:,} tokens')} (more is better)",
            rates,
            front([-rate for rate in rates], steps),
        ),
    )
    colors = [COLORS[i % len(COLORS)] for i in range(len(points))]
    for each, (label, values, best) in zip(axes, panels, strict=True):
        each.plot([values[i] for i in best], [recalls[i] for i in best], "--", color=INK, alpha=0.5, zorder=1)
        each.scatter(values, recalls, c=colors, s=45, zorder=2)
        each.set(xlabel=label, xlim=(min(values) / 2, max(values) * 2), ylim=(-0.08, 1.15))
        _log(each, "x")
    axes[0].set_ylabel(f"recall, {first['pairs']} pairs")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # labels are placed in the layout just computed
    for each in axes:
        place_labels(each, [point["name"] for point in points], [INK] * len(points))
    return figure


def scaling(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot the seconds of prefill against prompt length, and of a decoding step against context, for one sequence."""
    figure, axes = _figure(2)

    def alone(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        return [each for each in row[kind] if "median" in each and each["batch"] == 1 and not each["graph"]]

    for i, row in enumerate(rows):
        for each, kind in zip(axes, ("prefill", "decode"), strict=True):
            measured = alone(row, kind)
            if not measured:
                continue
            label = row["label"]
            if kind == "prefill" and row["prefill_exponent"] is not None:
                label += f": T^{row['prefill_exponent']:.2f}"
            elif kind == "decode" and row["decode_growth"] is not None:
                label += f": x {row['decode_growth']:.2f}"
            x, y = [m["tokens"] for m in measured], [m["median"] for m in measured]
            below = [m["median"] - m["lower_quartile"] for m in measured]
            above = [m["upper_quartile"] - m["median"] for m in measured]
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            each.errorbar(x, y, yerr=[below, above], label=label, linewidth=1.2, capsize=2, **style)
    for each, what in zip(axes, ("prompt, tokens", "context, tokens"), strict=True):
        each.set(xlabel=what)
        each.set_xscale("log", base=2)
        each.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
        if each.lines:
            _log(each, "y")
            each.legend(fontsize=7, framealpha=0)
    axes[0].set_ylabel("prefill, s")
    axes[1].set_ylabel("decoding step, s")
    return figure


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot recall over training steps, one line per seed at the best rate."""
    figure, (axes,) = _figure(1)
    for i, row in enumerate(rows):
        for n, curve in enumerate(row["curves"]):
            steps, recall = zip(*curve, strict=True)
            label = row["label"] if n == 0 else None
            axes.plot(steps, recall, color=COLORS[i % len(COLORS)], label=label, linewidth=1.3)
    axes.set(xlabel="training steps", ylabel="recall", ylim=(-0.03, 1.03))
    axes.legend(fontsize=7, framealpha=0)
    return figure
