"""Compose a report's sections: sentences, tables and plots, which are rendered as Markdown and as HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybridattn.evals.report.fronts import best_under, limits
from hybridattn.measure.cpu_probe import describe_load


class Entry(NamedTuple):
    """A table's entry: its text, and the number to sort by (None: sort by text)."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """Headings and rows; the first column has the rows' names."""

    heads: list[str]
    rows: list[list[Entry]]


@dataclass(frozen=True)
class Section:
    """A section of the report; ``figure`` is the name of its plot, ``code`` a preformatted text."""

    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figure: str | None = None
    caption: str = ""
    code: str | None = None


def sections(results: dict[str, Any]) -> list[Section]:
    """Return the report's sections that there are measurements for, from the content of ``results.json``."""
    rows, points = results["rows"], results["points"]
    made = [overview(rows, points) if rows else None, language_model(results["language_model"])]
    if rows:
        made += [fronts(points) if points else None, times(rows), memory(rows), learning(rows)]
    return [each for each in (*made, origin(results)) if each is not None]


# ------------------------------------------------------------------------------------------------------------- overview
def overview(rows: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> Section:
    """Return the section with the main table: recall, parameters, memory and speed of every row."""
    pairs = list(dict.fromkeys(n for row in rows for n in row["recall"]))
    prefill = [tokens for (tokens,) in _settings(rows, "prefill", ("tokens",))][:1]
    steps = _settings(rows, "decode", ("tokens", "batch", "graph"))
    state = list(dict.fromkeys(tokens for row in rows for tokens in row["state"]))
    columns: list[tuple[str, Callable[[dict[str, Any]], Entry]]] = [
        ("model", lambda row: Entry(row["label"])),
        *((f"recall, {n} pairs", lambda row, n=n: _recall(row["recall"].get(n))) for n in pairs),
        ("parameters", lambda row: number((row["facts"] or {}).get("parameters"), "{:,}")),
        *((f"state after {int(n):,} tokens, bytes", lambda row, n=n: _size(row["state"].get(n))) for n in state),
        *((f"prefill of {n:,}, tokens/s", lambda row, n=n: _rate(row, "prefill", tokens=n)) for n in prefill),
        *((f"{_step(*each)}, tokens/s", lambda row, s=each: _rate(row, "decode", **_named(s))) for each in steps),
    ]
    table = Table([head for head, _ in columns], [[entry(row) for _, entry in columns] for row in rows])
    texts = [
        "Every row is one configuration. Recall is the median over the training seeds at the best learning rate; "
        "brackets give the lowest and highest seed if they differ. Cache size and speed are measured on the first of "
        "these seeds. The size of a cache is its allocated memory. Speeds are computed from the median time of all "
        "samples."
    ]
    if baseline := _baseline(rows):
        texts.append(
            f"Brackets after a speed give the speed relative to {baseline}: the median over rounds of the ratio within "
            "a round."
        )
    return Section("One configuration, one row", texts, [table], "pareto" if points else None)


def _baseline(rows: Sequence[dict[str, Any]]) -> str:
    """Return the label of the baseline row, a description if there are several, or an empty string if there is none."""
    compared = {row["baseline"] for row in rows if row["baseline"] not in (None, row["label"])}
    return "the first model of its suite" if len(compared) > 1 else "".join(compared)


def _settings(rows: Sequence[dict[str, Any]], kind: str, names: Sequence[str]) -> list[Any]:
    """Return the settings at which any row was timed, sorted."""
    return sorted({tuple(each[name] for name in names) for row in rows for each in row[kind]})


def _named(setting: tuple[int, int, bool]) -> dict[str, Any]:
    return dict(zip(("tokens", "batch", "graph"), setting, strict=True))


def _step(tokens: int, batch: int, graph: bool) -> str:
    return f"decode after {tokens:,}, batch {batch}{', CUDA graph' if graph else ''}"


def one_line(row: dict[str, Any]) -> str:
    """Format a row for a terminal: recall, and the first measurement each of state bytes, prefill and decoding."""
    recall = "/".join(f"{found['median']:.3f}" for found in row["recall"].values())
    parts = [f"recall {recall} of {'/'.join(row['recall'])} pairs"] if recall else []
    parts += [f"state after {int(n):,}: {_size(sizes).text} bytes" for n, sizes in row["state"].items()][:1]
    for kind, work in (("prefill", "of"), ("decode", "after")):
        for timed in row[kind][:1]:
            text = _rate(row, kind, **_named(_setting(timed))).text
            rate, _, faster = text.partition(" (") if "median" in timed else (text, "", "")
            unit = f" tokens/s{f' ({faster}' if faster else ''}" if "median" in timed else ""
            parts.append(f"{kind} {work} {timed['tokens']:,}: {rate}{unit}")
    return f"{row['label']}: {', '.join(parts)}"


def _setting(timed: dict[str, Any]) -> tuple[int, int, bool]:
    return timed["tokens"], timed["batch"], timed["graph"]


def number(value: float | None, text: str) -> Entry:
    """Return an entry that is sorted by a number, or an empty entry for None."""
    return Entry("") if value is None else Entry(text.format(value), value)


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
    rate = timed["batch"] * (1 if kind == "decode" else timed["tokens"]) / timed["median"]
    faster = f" ({timed['speedup']['median']:.2f}x)" if timed["speedup"] else ""
    return Entry(f"{rate:,.0f}{faster}", rate)


# ------------------------------------------------------------------------------------------------------- language model
def language_model(found: dict[str, Any] | None) -> Section | None:
    """Return the section on the language model and the n-gram models."""
    if found is None:
        return None
    corpus, training, sample = found["corpus"], found["training"], found["continuation"]
    scores = found["bits_per_byte"]
    table = Table(
        ["", *scores], [[Entry("bits per byte, held out"), *(number(score, "{:.3f}") for score in scores.values())]]
    )
    texts = [
        f"A byte-level hybrid of {found['parameters']:,} parameters ({', '.join(found['mixers'])}), trained for "
        f"{training['seconds']:.0f} s ({training['steps']} steps, {training['tokens_per_second']:,.0f} tokens/s, "
        f"{training['threads']} threads{', bf16' if training['bf16'] else ''}) on the Python standard library: "
        f"{corpus['train_bytes']:,} bytes in {corpus['train_files']} files; {corpus['held_out_files']} other files "
        "were held out. The baselines are interpolated Witten-Bell n-gram models of order 0 to 4, fitted to the same "
        f"files. All are scored on the same {found['scored_bytes']:,} bytes: the last 256 of every 512-byte window.",
        "The text below was sampled at temperature 0.8 from the saved model, reloaded in a new process with "
        f"`AutoModelForCausalLM` and `AutoTokenizer`: {sample['tokens_per_second']:,.0f} tokens/s "
        f"({sample['threads']} thread).",
    ]
    return Section("A language model on real text", texts, [table], code=sample["text"])


# --------------------------------------------------------------------------------------------------------------- fronts
def fronts(points: Sequence[dict[str, Any]]) -> Section:
    """Return the section with the best recall within budgets of memory and time."""
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
            found = None if best is None else points[best]
            rows.append(
                [
                    Entry(f"{limit / scale:,.4g} {unit}", limit),
                    Entry("none" if found is None else found["name"]),
                    number(None if found is None else found["recall"], "{:.3f}"),
                    number(None if found is None else found[name] / scale, f"{{:,.4g}} {unit}"),
                ]
            )
        tables.append(Table([what, "best recall", "recall", "it takes"], rows))
    texts = [
        f"The best recall of {points[0]['pairs']} pairs within a budget of memory or of time. In the plot, dashed "
        "lines connect the Pareto front: rows that no other row equals in both quantities and exceeds in one."
    ]
    return Section("Pareto fronts", texts, tables)


# ---------------------------------------------------------------------------------------------------------------- times
def times(rows: Sequence[dict[str, Any]]) -> Section | None:
    """Return the section with times of prefill, decoding and training by length."""
    lengths = [_named((*each, False)) for each in _settings(rows, "prefill", ("tokens", "batch"))]
    steps = [_named(each) for each in _settings(rows, "decode", ("tokens", "batch", "graph"))]
    trained = [_named((*each, False)) for each in _settings(rows, "training", ("tokens", "batch"))]
    tables = []
    for kind, title, settings in (
        ("prefill", "prefill, ms", lengths),
        ("decode", "decoding step, ms", steps),
        ("training", "forward and backward, ms", trained),
    ):
        if not settings:
            continue
        heads = [f"{each['tokens']:,} tokens" for each in settings]
        if kind == "decode":
            heads = [_step(**each).removeprefix("decode ") for each in settings]
        more, entries = _LAST_COLUMNS[kind]
        body = [
            [Entry(row["label"]), *(_time(_at(row, kind, each)) for each in settings), *entries(row, settings)]
            for row in rows
        ]
        tables.append(Table([title, *heads, *more], body))
    if not tables:
        return None
    texts = [
        "Entries are the median of all samples, with lower and upper quartile in brackets. The exponent is b in "
        "a * T^b, fitted to the median times of all lengths T. Prefill ends with the first new token."
    ]
    if baseline := _baseline(rows):
        texts.append(
            f"After the semicolon is the speed relative to {baseline}: median and range, over rounds, of the ratio "
            "within a round."
        )
    has = any(row["prefill_exponent"] is not None for row in rows)
    caption = "For one sequence; bars show quartiles."
    return Section("Time against length", texts, tables, "scaling" if has else None, caption)


def _time(timed: dict[str, Any] | None) -> Entry:
    """Format median and quartiles in milliseconds, and the speed relative to the baseline."""
    if timed is None or "reason" in timed:
        return Entry("" if timed is None else timed["reason"])
    middle, low, high = (timed[name] * 1e3 for name in ("median", "lower_quartile", "upper_quartile"))
    text, ratio = f"{middle:,.3g} ({low:,.3g}-{high:,.3g})", timed["speedup"]
    faster = f"; {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
    return Entry(text + faster, timed["median"])


def _mega(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _prefill_columns(row: dict[str, Any], _settings: Sequence[dict[str, Any]]) -> list[Entry]:
    peaks = [each["peak_bytes"] for each in row["prefill"] if each.get("peak_bytes") is not None]
    return [number(row["prefill_exponent"], "{:.2f}"), number(_mega(peaks[-1] if peaks else None), "{:,.1f}")]


def _decode_columns(row: dict[str, Any], _settings: Sequence[dict[str, Any]]) -> list[Entry]:
    return [number(row["decode_growth"], "{:.2f}")]


def _training_columns(row: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[Entry]:
    last = _at(row, "training", settings[-1]) or {}
    rate = last["batch"] * last["tokens"] / last["median"] if "median" in last else None
    return [number(rate, "{:,.0f}"), number(_mega(last.get("peak_bytes")), "{:,.1f}")]


_LAST_COLUMNS = {
    "prefill": (["exponent", "peak MB at the longest"], _prefill_columns),
    "decode": (["longest over shortest context"], _decode_columns),
    "training": (["tokens/s", "peak MB"], _training_columns),
}


# ----------------------------------------------------------------------------------------------------- memory, learning
def memory(rows: Sequence[dict[str, Any]]) -> Section | None:
    """Return the section with the largest batches within the memory budget."""
    found = [row for row in rows if "tried" in (row["largest_batch"] or {})]
    if not found:
        return None
    heads = ["model", "budget, MB", "prompt, tokens", "largest batch", "its memory, MB", "next larger batch tried"]
    body = []
    for row in found:
        largest = row["largest_batch"]
        taken = next((each["bytes"] for each in largest["tried"] if each["batch"] == largest["batch"]), None)
        larger = [each for each in largest["tried"] if each["batch"] > largest["batch"]]
        numbers = [number(largest["budget"] / 1e6, "{:,.6g}"), number(largest["tokens"], "{:,}")]
        over = _attempt(min(larger, key=lambda tried: tried["batch"])) if larger else "none"
        numbers += [number(largest["batch"], "{:,}"), number(_mega(taken), "{:,.1f}")]
        body.append([Entry(row["label"]), *numbers, Entry(over)])
    texts = [
        "The largest number of sequences that can be decoded together within the memory budget, found by bisection. "
        "Memory is the peak of all tensors: weights, caches and temporaries of prefill and a decoding step."
    ]
    return Section("Largest batch", texts, [Table(heads, body)])


def _attempt(tried: dict[str, Any]) -> str:
    over = "out of memory" if tried["bytes"] is None else f"{tried['bytes'] / 1e6:,.1f} MB"
    return f"{tried['batch']:,}: {over}"


def learning(rows: Sequence[dict[str, Any]]) -> Section | None:
    """Return the section on recall over seeds and training steps."""
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
        "Recall over the seeds at the learning rate with the best median, for the number of pairs of the learning "
        f"curve. The threshold is {threshold:g}. Steps to it are the median over the runs that reached it."
    ]
    drawn = any(len(curve) > 1 for row in found for curve in row["curves"])
    figure = "learnability" if drawn else None
    return Section("Learnability", texts, [Table(heads, body)], figure, "One line per seed, at the best rate.")


# --------------------------------------------------------------------------------------------------------------- origin
def origin(results: dict[str, Any]) -> Section:
    """Return the section on the origin of the measurements and the load of the CPU during them."""
    body = []
    for row in results["rows"]:
        operators = ", ".join((row["facts"] or {}).get("attention_operators") or []) or "not measured"
        body.append([Entry(row["label"]), Entry(row["config_sha256"][:16]), Entry(operators)])
    texts = []
    for source in results["provenance"]:
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items() if version)
        texts.append(
            f"{source['measurements']} measurements on {source['device']} ({source['cpu']}, {source['cores']} cores), "
            f"{source['platform']}, {versions}, commit {source['commit']}, {source['first']} to {source['last']}."
        )
    texts += [f"{device}: {describe_load(seconds)}" for device, seconds in results["probes"].items()]
    tables = [Table(["row", "configuration", "attention operators"], body)] if body else []
    return Section("Where the figures come from", texts, tables)
