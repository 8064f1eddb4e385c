"""What a report says: sections of sentences, tables and one picture each, for Markdown and for a page alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybridattn.evals.report.rows import best_under, limits
from hybridattn.evals.speed.statistics import LEVEL, TOLERANCE


class Entry(NamedTuple):
    """A table's entry: its text, and the number it is sorted by, None for text."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """Heads and rows; the first column names the rows."""

    heads: list[str]
    rows: list[list[Entry]]


@dataclass(frozen=True)
class Section:
    """A part of the report; ``figure`` is the name of its picture."""

    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figure: str | None = None
    caption: str = ""


def number(value: float | None, text: str) -> Entry:
    """An entry that is sorted by a number; an empty one where there is none."""
    return Entry("") if value is None else Entry(text.format(value), value)


def milliseconds(timed: dict[str, Any]) -> Entry:
    """Median and interval."""
    if "reason" in timed:
        return Entry(timed["reason"])
    text = f"{timed['median'] * 1e3:,.3g} ({timed['low'] * 1e3:,.3g}-{timed['high'] * 1e3:,.3g})"
    return Entry(text, timed["median"])


def sections(
    rows: Sequence[dict[str, Any]],
    points: Sequence[dict[str, Any]],
    kernels: Sequence[dict[str, Any]],
    provenance: Sequence[dict[str, Any]],
) -> list[Section]:
    """The report's parts that there are figures for."""
    made = [overview(rows), *([fronts(points)] if points else []), scaling(rows), memory(rows), learning(rows)]
    return [each for each in (*made, operators(kernels), origin(rows, provenance)) if each is not None]


def overview(rows: Sequence[dict[str, Any]]) -> Section:
    """One configuration, one row."""
    pairs = list(dict.fromkeys(n for row in rows for n in row["recall"]))
    prefill = list(dict.fromkeys(each["tokens"] for row in rows for each in row["prefill"]))[:1]
    steps = _keys(rows, "decode", ("tokens", "batch", "graph"))
    state = list(dict.fromkeys(tokens for row in rows for tokens in row["state"]))
    columns: list[tuple[str, Callable[[dict[str, Any]], Entry]]] = [
        ("model", lambda row: Entry(row["label"])),
        *((f"recall, {n} pairs", lambda row, n=n: _recall(row["recall"].get(n))) for n in pairs),
        ("parameters", lambda row: number((row["facts"] or {}).get("parameters"), "{:,}")),
        *((f"state after {int(n):,} tokens, bytes", lambda row, n=n: _size(row["state"].get(n))) for n in state),
        *((f"prefill of {n:,}, tokens/s", lambda row, n=n: _rate(row, "prefill", tokens=n)) for n in prefill),
        *((_decode_head(*key), lambda row, key=key: _rate(row, "decode", **_named(key))) for key in steps),
    ]
    table = Table([head for head, _ in columns], [[entry(row) for _, entry in columns] for row in rows])
    texts = [
        "Every row is one configuration: the model that recalls is the one whose cache and speed are measured. Recall "
        "is the median of the training seeds, in brackets the lowest and the highest of them where they differ. A "
        "cache has the bytes that were allocated; the command fails where its formula says another number. Speeds are "
        "at the median time of the samples."
    ]
    return Section("One configuration, one row", texts, [table])


def _named(key: tuple[int, int, bool]) -> dict[str, Any]:
    return dict(zip(("tokens", "batch", "graph"), key, strict=True))


def _keys(rows: Sequence[dict[str, Any]], kind: str, names: Sequence[str]) -> list[Any]:
    """The settings that any row was timed at, in order."""
    return sorted({tuple(each[name] for name in names) for row in rows for each in row[kind]})


def _decode_head(tokens: int, batch: int, graph: bool) -> str:
    graphed = ", CUDA graph" if graph else ""
    return f"decode after {tokens:,}, batch {batch}{graphed}, tokens/s"


def _recall(found: dict[str, Any] | None) -> Entry:
    if found is None:
        return Entry("")
    low, high = f"{found['low']:.3f}", f"{found['high']:.3f}"
    spread = f" ({low}-{high})" if low != high else ""
    return Entry(f"{found['median']:.3f}{spread}", found["median"])


def _size(sizes: dict[str, Any] | None) -> Entry:
    if sizes is None or "reason" in sizes:
        return Entry("" if sizes is None else sizes["reason"])
    return Entry(f"{sizes['allocated']:,}", sizes["allocated"])


def _at(row: dict[str, Any], kind: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((each for each in row[kind] if all(each[name] == value for name, value in wanted.items())), None)


def _rate(row: dict[str, Any], kind: str, **wanted: Any) -> Entry:
    timed = _at(row, kind, wanted)
    if timed is None or "reason" in timed:
        return Entry("" if timed is None else timed["reason"])
    work = timed["batch"] * (1 if kind == "decode" else timed["tokens"])
    return number(work / timed["median"], "{:,.0f}")


def fronts(points: Sequence[dict[str, Any]]) -> Section:
    """The picture, and what is best within a budget."""
    recalls = [point["recall"] for point in points]
    tables = []
    for name, what, scale, unit in (
        ("state_bytes", f"state after {points[0]['state_tokens']:,} tokens of at most", 1e3, "kB"),
        ("step", f"decoding step after {points[0]['context']:,} tokens, one sequence, of at most", 1e-3, "ms"),
    ):
        costs = [point[name] for point in points]
        budgets = limits(costs)
        rows = []
        for limit, best in zip(budgets, best_under(costs, recalls, budgets), strict=True):
            cells = [Entry(f"{limit / scale:,.4g} {unit}", limit)]
            found = None if best is None else points[best]
            cells += [Entry("none" if found is None else found["name"])]
            cells += [number(None if found is None else found["recall"], "{:.3f}")]
            rows.append([*cells, number(None if found is None else found[name] / scale, f"{{:,.4g}} {unit}")])
        tables.append(Table([what, "best recall", "recall", "it takes"], rows))
    texts = [f"Recall of {points[0]['pairs']} pairs, and the best of it within a budget of memory or of time."]
    return Section("Fronts", texts, tables, "pareto", "Dashed: what no other row beats in both.")


def scaling(rows: Sequence[dict[str, Any]]) -> Section | None:
    """Time against length."""
    lengths = _keys(rows, "prefill", ("tokens",))
    steps = _keys(rows, "decode", ("tokens", "batch", "graph"))
    learns = _keys(rows, "training", ("tokens",))
    if not (lengths or steps or learns):
        return None
    tables = []
    if lengths:
        heads = ["prefill, ms", *(f"{n:,} tokens" for (n,) in lengths), "exponent", "peak MB at the longest"]
        tables.append(Table(heads, [[*_times(row, "prefill", lengths), *_growth(row)] for row in rows]))
    if steps:
        heads = [_decode_head(*key).removeprefix("decode ").removesuffix(", tokens/s") for key in steps]
        body = []
        for row in rows:
            times = [_time(row, "decode", _named(key)) for key in steps]
            body.append([Entry(row["label"]), *times, number(row["decode_growth"], "{:.2f}")])
        tables.append(Table(["decoding step, ms", *heads, "longest over shortest context"], body))
    if learns:
        heads = ["forward and backward, ms", *(f"{n:,} tokens" for (n,) in learns), "tokens/s", "peak MB"]
        body = []
        for row in rows:
            last = _at(row, "training", {"tokens": learns[-1][0]}) or {}
            rate = last["tokens"] / last["median"] if "median" in last else None
            peak = [number(rate, "{:,.0f}"), number(_mega(last.get("peak_bytes")), "{:,.1f}")]
            body.append([*_times(row, "training", learns), *peak])
        tables.append(Table(heads, body))
    texts = [
        f"Medians in milliseconds, in brackets where {LEVEL:.0%} of resampled medians lie (rounds are resampled, then "
        "samples within each). The exponent b is that of a * T^b, fitted to all lengths. Prefill ends with the first "
        "new token: it is the time to it.",
        *_disturbed(rows),
        *_corrected(rows),
    ]
    has = any(row["prefill_exponent"] is not None for row in rows)
    return Section("Time against length", texts, tables, "scaling" if has else None, "One sequence; bars: intervals.")


def _disturbed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on samples that do not count."""
    timed = [each for row in rows for kind in ("prefill", "decode", "training") for each in row[kind]]
    timed = [each for each in timed if "median" in each]
    aside = sum(each["set_aside"] for each in timed)
    few = [each["tolerance"] for each in timed if each["tolerance"] > TOLERANCE]
    if not aside and not few:
        return []
    share = aside / (aside + sum(each["samples"] for each in timed))
    text = (
        f"A fixed piece of work is timed before and after every sample. Where it took more than {TOLERANCE} times what "
        f"it takes on the undisturbed machine, the sample does not count: {share:.0%} of them."
    )
    if few:
        text += (
            f" For {len(few)} of {len(timed)} figures too few samples or rounds were left, and the least disturbed "
            f"ones count, up to {max(few):.2f} times."
        )
    return [text]


def _corrected(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on the correction for what slowed a round."""
    timed = [each for row in rows for kind in ("prefill", "decode", "training") for each in row[kind]]
    by = [each["median"] / each["measured"] - 1 for each in timed if "measured" in each]
    if not any(by):
        return []
    return [
        "Reads of memory are timed before the calls of every figure. What their drift between rounds, and the share of "
        "disturbed samples, explain of the times that count is taken out by a regression, which changes medians by "
        f"{min(by):+.1%} to {max(by):+.1%}; those without it are in results.json."
    ]


def _time(row: dict[str, Any], kind: str, wanted: dict[str, Any]) -> Entry:
    timed = _at(row, kind, wanted)
    return Entry("") if timed is None else milliseconds(timed)


def _times(row: dict[str, Any], kind: str, lengths: Sequence[tuple[int]]) -> list[Entry]:
    return [Entry(row["label"]), *(_time(row, kind, {"tokens": n}) for (n,) in lengths)]


def _growth(row: dict[str, Any]) -> list[Entry]:
    peaks = [each["peak_bytes"] for each in row["prefill"] if each.get("peak_bytes") is not None]
    return [number(row["prefill_exponent"], "{:.2f}"), number(_mega(peaks[-1] if peaks else None), "{:,.1f}")]


def _mega(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def memory(rows: Sequence[dict[str, Any]]) -> Section | None:
    """The largest batches."""
    found = [row for row in rows if "tried" in (row["largest_batch"] or {})]
    if not found:
        return None
    heads = ["model", "budget, MB", "prompt, tokens", "largest batch", "MB with it", "the next one tried"]
    body = []
    for row in found:
        largest = row["largest_batch"]
        taken = next((each["bytes"] for each in largest["tried"] if each["batch"] == largest["batch"]), None)
        larger = [each for each in largest["tried"] if each["batch"] > largest["batch"]]
        numbers = [number(largest["budget"] / 1e6, "{:,.6g}"), number(largest["tokens"], "{:,}")]
        body.append([Entry(row["label"]), *numbers, number(largest["batch"], "{:,}")])
        over = _attempt(min(larger, key=lambda tried: tried["batch"])) if larger else "none"
        body[-1] += [number(_mega(taken), "{:,.1f}"), Entry(over)]
    texts = [
        "Sequences that are decoded together within the budget, found by bisection: weights, caches and a decoding "
        "step at their peak, all of it tensors."
    ]
    return Section("Largest batch", texts, [Table(heads, body)])


def _attempt(tried: dict[str, Any]) -> str:
    over = "out of memory" if tried["bytes"] is None else f"{tried['bytes'] / 1e6:,.1f} MB"
    return f"{tried['batch']:,}: {over}"


def learning(rows: Sequence[dict[str, Any]]) -> Section | None:
    """How reliably the models learnt."""
    found = [row for row in rows if row["learnability"] is not None]
    if not found:
        return None
    heads = ["model", "steps", "rate", "median", "best", "worst", "reached the threshold", "steps to it"]
    body = []
    for row in found:
        learnt = row["learnability"]
        shares = [number(learnt[name], "{:.3f}") for name in ("median", "best", "worst")]
        cells = [Entry(row["label"]), number(row["config"]["train"]["steps"], "{:,}")]
        cells += [number(learnt["rate"], "{:g}"), *shares]
        cells += [Entry(f"{learnt['reached']} of {learnt['runs']}", learnt["reached"] / learnt["runs"])]
        body.append([*cells, number(learnt["steps_to_threshold"], "{:,.0f}")])
    threshold = found[0]["learnability"]["threshold"]
    texts = [
        "Recall of the most telling number of pairs at the rate with the best median, over the seeds; the threshold "
        f"is {threshold:g}, and the steps to it are the median of the runs that got there."
    ]
    drawn = any(len(curve) > 1 for row in found for curve in row["curves"])
    figure = "learnability" if drawn else None
    return Section("Learnability", texts, [Table(heads, body)], figure, "A line per seed, at the best rate.")


def operators(kernels: Sequence[dict[str, Any]]) -> Section | None:
    """Every operator at its bytes and operations, against the machine's ceilings."""
    if not kernels:
        return None
    heads = ["operator", "device", "shape", "by", "forward, ms", "of copy", "of matmul", "with backward, ms", "peak MB"]
    body = []
    for line in kernels:
        shape = "x".join(map(str, line["shape"]))
        cells = [Entry(line["work"]), Entry(line["device"]), Entry(shape), Entry(line["contestant"])]
        if "reason" in line:
            body.append([*cells, Entry(line["reason"]), *[Entry("")] * 4])
            continue
        both = (line.get("forward_backward_seconds") or {}).get("median")
        shares = [number(100 * line[name], "{:.1f} %") for name in ("share_of_copy", "share_of_matmul")]
        cells += [number(line["forward_seconds"]["median"] * 1e3, "{:,.3g}"), *shares]
        cells += [
            number(None if both is None else both * 1e3, "{:,.3g}"),
            number(_mega(line.get("peak_bytes")), "{:,.0f}"),
        ]
        body.append(cells)
    texts = [
        f"On {line['device']} a copy moves {line['copy_bytes_per_second'] / 1e9:,.1f} GB/s, a matrix product makes "
        f"{line['matmul_flop_per_second'] / 1e9:,.1f} GFLOP/s."
        for line in {line["device"]: line for line in kernels}.values()
    ]
    texts += [
        "Shape: batch, tokens, heads, key and value dims. Bytes are those that must move, operations those of the "
        "formula in chunks: more of either is no merit. What is wrong has no speed."
    ]
    has = any("reason" not in line for line in kernels)
    caption = "The line is what copy and matrix product allow, one per device."
    return Section("Operators and roofline", texts, [Table(heads, body)], "roofline" if has else None, caption)


def origin(rows: Sequence[dict[str, Any]], provenance: Sequence[dict[str, Any]]) -> Section:
    """Where the figures come from."""
    heads = ["row", "configuration", "attention operators"]
    body = []
    for row in rows:
        told = ", ".join((row["facts"] or {}).get("attention_operators") or []) or "not measured"
        body.append([Entry(row["label"]), Entry(row["config_sha256"][:16]), Entry(told)])
    texts = []
    for source in provenance:
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items() if version)
        texts.append(
            f"{source['cells']} figures on {source['device']} ({source['cpu']}, {source['cores']} cores), "
            f"{source['platform']}, {versions}, commit {source['commit']}, {source['first']} to {source['last']}."
        )
    return Section("Where the figures come from", texts, [Table(heads, body)])
