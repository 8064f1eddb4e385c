"""Run a suite: train its models on MQAR if needed, measure all of them in rounds, and write the report.

Every measurement is stored at once and looked up before it is made, so a run that was killed can resume. The report is
rewritten after the training, after every round, and when the run is interrupted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from hybridattn.evals.pareto.suite import DTYPES, Suite
from hybridattn.evals.recall.learnability import learnability, steps_to_threshold
from hybridattn.evals.recall.training_pool import Job, Trained, train_all
from hybridattn.evals.report.build import build
from hybridattn.evals.report.document import one_line
from hybridattn.evals.report.rows import TIMED, row_key, rows, run_of
from hybridattn.evals.report.store import Store
from hybridattn.evals.speed import latency, memory, models
from hybridattn.layers import SoftmaxAttention
from hybridattn.measure.cpu_probe import probe_seconds
from hybridattn.measure.provenance import cpu_name
from hybridattn.models.decoder import HybridAttnConfig
from hybridattn.models.decoder.mixer_list import describe

Planned = tuple[str, dict[str, Any], Callable[[PreTrainedModel], dict[str, Any]]]
"""A measurement's kind and configuration, and the function that measures a model."""


def run_suite(
    suite: Suite, out: Path, *, title: str, shard: tuple[int, int] | None = None, again: bool = False
) -> dict[str, Any]:
    """Make the measurements that ``out`` does not have yet, and write the report there.

    Args:
        suite: models and measurements.
        out: folder of measurements, weights and report.
        title: title of the report.
        shard: (i, n) to only train the i-th of n parts: every n-th model, from the i-th on, counted from 1. To measure
            the models, merge the folders of all parts on one machine, then run without a shard.
        again: repeat timings that are in ``out`` already.

    Returns:
        The content of the report's ``results.json``.

    Raises:
        ValueError: ``shard`` is out of range or trains no model, or there is no GPU for device "cuda"; or as `Store`.
    """
    store = Store(out)
    part, parts = shard or (1, 1)
    if not 1 <= part <= parts:
        raise ValueError(f"shard: expected i/n with 1 <= i <= n, got {part}/{parts}")
    if part > len(suite.models):
        raise ValueError(f"shard: expected i up to the number of models, {len(suite.models)}, got {part}/{parts}")
    if shard and (again or not any(entry["steps"] for entry in suite.models.values())):
        given = "--again, which only repeats timings" if again else "a suite without training"
        raise ValueError(f"shard: expected a suite with models to train, and not --again, got {given}")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' without a GPU, got 'cuda'")
    if again:
        row_keys = {row_key(base(suite, name)) for name in suite.models}
        timed = ("model", "state", "largest_batch", *TIMED)
        store.remove(lambda each: each["kind"] in timed and row_key(each["config"]) in row_keys)
    try:
        train(suite, list(suite.models)[part - 1 :: parts], store)
        if shard is None:
            if store.found:
                build(out, title=title)
            measure(suite, store, lambda: build(out, title=title))
    except BaseException as reason:  # also KeyboardInterrupt: report the measurements made so far
        if store.found:
            build(out, title=title)
            hint = "Run the same command again to resume." if isinstance(reason, KeyboardInterrupt) else ""
            print(f"Measurements are incomplete; report so far: {out / 'report.html'}. {hint}")
        raise
    return build(out, title=title)


def device_name(suite: Suite) -> str:
    """Return the name of the suite's GPU or CPU."""
    return torch.cuda.get_device_name() if suite.device == "cuda" else cpu_name()


def base(suite: Suite, name: str) -> dict[str, Any]:
    """Return the configuration that all measurements of a row share; its hash identifies the row."""
    entry = suite.models[name]
    trained = {"procedure": suite.procedure, "steps": entry["steps"]} if entry["steps"] else None
    common = {"name": name, "model": entry["model"], "train": trained, "device": device_name(suite)}
    return {**common, "dtype": suite.dtype, "threads": suite.threads}


# ------------------------------------------------------------------------------------------------------------- training
def trainings(suite: Suite, name: str) -> Iterator[tuple[dict[str, Any], Job]]:
    """Yield the configurations of a model's recall measurements, each with the job that makes it."""
    entry = suite.models[name]
    for rate in suite.rates if entry["steps"] else ():
        for seed in suite.seeds:
            config = {**base(suite, name), "seed": seed, "rate": rate, "looks": suite.looks}
            options = entry["model"]["config"]
            yield config, Job(options, entry["steps"], seed, rate, suite.looks, suite.procedure, suite.device)


def train(suite: Suite, names: Sequence[str], store: Store) -> None:
    """Train the models whose recall or weights are not stored yet; store both."""
    wanted = [
        each
        for name in names
        for each in trainings(suite, name)
        if store.get("recall", each[0]) is None or not store.weights_of(each[0]).exists()
    ]

    def keep(index: int, trained: Trained) -> None:
        config, job = wanted[index]
        file = store.weights_of(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        # safetensors rejects a tied weight, one array under two names; loading the model ties the head again.
        written = {each: values for each, values in trained.weights.items() if each != "lm_head.weight"}
        save_file(written, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)  # atomic
        figures = {
            "recall": {str(pairs): share for pairs, share in trained.recall.items()},
            "curve": trained.curve,
            "steps_to_threshold": steps_to_threshold(trained.curve),
            "seconds": trained.seconds,
        }
        store.add("recall", config, figures, device=device_name(suite))
        shares = ", ".join(f"{share:.3f} of {pairs} pairs" for pairs, share in trained.recall.items())
        tqdm.write(f"{config['name']}, seed {job.seed}, rate {job.rate:g}: {job.steps} steps, recall {shares}")

    train_all([job for _, job in wanted], keep)


def model_of(suite: Suite, name: str, store: Store) -> PreTrainedModel:
    """Load the model to time: the first seed at the best learning rate if the suite trains it, else its definition."""
    where = {"dtype": DTYPES[suite.dtype], "device": suite.device}
    model = models.build(suite.models[name]["model"], **where)
    if configs := [config for config, _ in trainings(suite, name)]:
        rate = learnability([run_of(config, store.get("recall", config) or {}) for config in configs])["rate"]
        best = next(config for config in configs if config["rate"] == rate)
        stored = {each: torch.from_numpy(values) for each, values in load_file(store.weights_of(best)).items()}
        missing, unexpected = model.load_state_dict(stored, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{name}: expected the model's weights, got missing {missing}, unexpected {unexpected}")
    return model


# ---------------------------------------------------------------------------------------------------------- measurement
def measure(suite: Suite, store: Store, write_report: Callable[[], object]) -> None:
    """Measure every model once per round; in the first round, print a model's row after it has been measured."""
    has_estimate = False
    with tqdm(total=suite.rounds * len(suite.models), desc="measuring", unit="model") as bar, threads(suite.threads):
        for turn in range(suite.rounds):
            start, in_round, missing = time.perf_counter(), uuid4().hex[:8], missing_in(suite, store, turn)
            for name in suite.models:
                bar.set_postfix_str(f"round {turn + 1} of {suite.rounds}, {name}")
                if missing[name]:
                    measure_model(suite, name, missing[name], store, in_round)
                if turn == 0:
                    tqdm.write(one_line(next(row for row in rows_of(suite, store) if row["config"]["name"] == name)))
                bar.update()
            more = suite.rounds - turn - 1
            if any(missing.values()) and more:
                if not has_estimate:
                    took = time.perf_counter() - start
                    tqdm.write(f"A round takes {took:,.0f} s; {more} more take about {more * took / 60:.0f} min.")
                    has_estimate = True
                write_report()


def rows_of(suite: Suite, store: Store) -> list[dict[str, Any]]:
    """Return the report rows of the suite's models."""
    row_keys = {row_key(base(suite, name)) for name in suite.models}
    known = (each for each in store.found.values() if "name" in each["config"])
    return rows([each for each in known if row_key(each["config"]) in row_keys])


def missing_in(suite: Suite, store: Store, turn: int) -> dict[str, list[Planned]]:
    """Return the measurements of a round that are missing, by model.

    Rows are compared within a round, so one run must take all times of a round. If it did not, because it was killed or
    because the suite has a new model, all times of the round are taken again.
    """
    planned = {
        name: [each for each in plan(suite, name, turn) if is_possible(store, *each[:2])] for name in suite.models
    }
    taken = [store.get(kind, config) for each in planned.values() for kind, config, _ in each if kind in TIMED]
    is_whole = None not in taken and len({each["in_round"] for each in taken if each and "in_round" in each}) <= 1
    return {
        name: [each for each in all_of if store.get(*each[:2]) is None or (each[0] in TIMED and not is_whole)]
        for name, all_of in planned.items()
    }


def is_possible(store: Store, kind: str, config: dict[str, Any]) -> bool:
    """Whether a measurement did not fail in the first round for lack of memory or positions."""
    first = store.get(kind, {**config, "round": 0}) if "round" in config else None
    return first is None or "reason" not in first


def measure_model(suite: Suite, name: str, missing: Sequence[Planned], store: Store, in_round: str) -> None:
    """Make the missing measurements of one model and store them."""
    model = model_of(suite, name, store)
    most = latency.positions(model)
    baseline = row_key(base(suite, next(iter(suite.models))))
    for kind, config, call in missing:
        tokens = config.get("tokens", 0) + (latency.MOST_STEPS + 2 if kind == "decode" else 0)
        before = probe_seconds() if suite.device == "cpu" else 0
        try:
            figures = {"reason": f"it has {most} positions"} if most is not None and tokens > most else call(model)
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            figures = {"reason": "out of memory"}
        if "seconds" in figures:
            figures = {**figures, "in_round": in_round, "baseline": baseline}
            figures |= {"probe": exact([before, probe_seconds()])} if suite.device == "cpu" else {}
        store.add(kind, config, figures, device=device_name(suite))


def plan(suite: Suite, name: str, turn: int) -> Iterator[Planned]:
    """Yield a model's measurements in one round; sizes do not vary, so only the first round measures them."""
    common = base(suite, name)
    if turn == 0:
        yield "model", common, facts
        for tokens in suite.state:
            yield "state", {**common, "tokens": tokens}, partial(memory.cache_sizes, tokens=tokens)
    timed = {**common, "round": turn, "seconds": suite.seconds}
    options = {"seconds": suite.seconds, "with_peak": turn == 0}
    for tokens in suite.prefill:
        call = partial(time_pass, latency.prefill, tokens=tokens, **options)
        yield "prefill", {**timed, "tokens": tokens, "batch": 1}, call
    for tokens, batch in suite.decode:
        for graph in (False, True) if suite.graphs else (False,):
            setting = {"tokens": tokens, "batch": batch, "graph": graph}
            yield "decode", {**timed, **setting}, partial(time_pass, latency.decode, seconds=suite.seconds, **setting)
    for tokens in suite.training:
        call = partial(time_pass, latency.training, tokens=tokens, **options)
        yield "training", {**timed, "tokens": tokens, "batch": 1}, call
    if turn == 0 and suite.memory is not None:
        yield "largest_batch", {**common, **suite.memory}, partial(memory.largest_batch, **suite.memory)


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return the properties of a model that a row lists."""
    config = model.config
    return {
        "type": config.model_type,
        "mixers": [describe(entry) for entry in config.mixers or ()] if isinstance(config, HybridAttnConfig) else None,
        "reach": _reach(model) if isinstance(config, HybridAttnConfig) else None,
        "attn_implementation": config._attn_implementation,
        "attention_operators": latency.attention_operators(model),
        "parameters": model.num_parameters(),
        "weight_bytes": memory.weight_bytes(model),
    }


def _reach(model: PreTrainedModel) -> int | None:
    """Return the tokens after which the model's cache no longer grows; None if it always grows."""
    reach = 1
    for layer in model.modules():
        if isinstance(layer, SoftmaxAttention):
            if layer.window is None:
                return None
            reach = max(reach, layer.window)
    return reach


def time_pass(
    run_pass: Callable[..., list[float]], model: PreTrainedModel, *, with_peak: bool = False, **options: Any
) -> dict[str, Any]:
    """Return the samples of a function of `latency` in seconds, and its peak memory in bytes (None: not measured)."""
    once = partial(run_pass, model, least=1, **{**options, "seconds": 0})
    peak = memory.peak_bytes(once, model.device) if with_peak else None
    return {"seconds": exact(run_pass(model, **options)), "peak_bytes": peak}


def exact(seconds: Sequence[float]) -> list[float]:
    """Round samples to nanoseconds, the resolution of the clock."""
    return [round(each, 9) for each in seconds]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads per operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
