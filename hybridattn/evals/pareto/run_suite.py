"""Carry out a suite: train the models that have to be trained, then measure all of them in rounds, and report.

Every measurement is stored as soon as it has been made and looked up before it is made, so a run that was killed goes
on. The report is written anew after every stage, and when the run is interrupted.
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

Planned = tuple[str, dict[str, Any], Callable[[PreTrainedModel], dict[str, Any]]]
"""Kind and configuration of a measurement, and the function of the model that makes it."""


def run_suite(
    suite: Suite, out: Path, *, title: str, shard: tuple[int, int] | None = None, again: bool = False
) -> dict[str, Any]:
    """Measure what ``out`` does not have yet, and write the report there.

    Args:
        suite: what to measure.
        out: the folder of measurements, weights and report.
        title: of the report.
        shard: (i, n): only train the i-th of n parts, from 1: every n-th model, beginning with the i-th. Measurements
            of trained models need all of them on one machine: merge the parts, then run without a shard.
        again: time again what is there.

    Returns:
        The content of the report's ``results.json``.

    Raises:
        ValueError: ``shard`` is out of range or trains nothing, there is no GPU for device "cuda"; or as `Store`.
    """
    store = Store(out)
    part, parts = shard or (1, 1)
    if not 1 <= part <= parts:
        raise ValueError(f"shard: expected i/n with 1 <= i <= n, got {part}/{parts}")
    if part > len(suite.models):
        raise ValueError(f"shard: expected a part with a model, there are {len(suite.models)}, got {part}/{parts}")
    if shard and (again or not any(entry["steps"] for entry in suite.models.values())):
        raise ValueError("shard: expected models to train, which is all that a part does; and not --again, which times")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' without a GPU, got 'cuda'")
    if again:
        ours = {row_key(base(suite, name)) for name in suite.models}
        timed = ("model", "state", "largest_batch", *TIMED)
        store.remove(lambda each: each["kind"] in timed and row_key(each["config"]) in ours)
    try:
        train(suite, list(suite.models)[part - 1 :: parts], store)
        if shard is None:
            if store.found:
                build(out, title=title)
            measure(suite, store, lambda: build(out, title=title))
    except BaseException as reason:  # Ctrl-C above all: what there is makes a report
        if store.found:
            build(out, title=title)
            hint = "The same command goes on." if isinstance(reason, KeyboardInterrupt) else ""
            print(f"Not all was measured; what there is: {out / 'report.html'}. {hint}")
        raise
    return build(out, title=title)


def device_name(suite: Suite) -> str:
    """The name of what the suite runs on."""
    return torch.cuda.get_device_name() if suite.device == "cuda" else cpu_name()


def base(suite: Suite, name: str) -> dict[str, Any]:
    """What all measurements of a row have in common; its hash identifies the row."""
    entry = suite.models[name]
    trained = {"procedure": suite.procedure, "steps": entry["steps"]} if entry["steps"] else None
    common = {"name": name, "model": entry["model"], "train": trained, "device": device_name(suite)}
    return {**common, "dtype": suite.dtype, "threads": suite.threads}


# ------------------------------------------------------------------------------------------------------------- training
def trainings(suite: Suite, name: str) -> Iterator[tuple[dict[str, Any], Job]]:
    """The configurations of a model's recall measurements, and the jobs that make them."""
    entry = suite.models[name]
    for rate in suite.rates if entry["steps"] else ():
        for seed in suite.seeds:
            config = {**base(suite, name), "seed": seed, "rate": rate, "looks": suite.looks}
            options = entry["model"]["config"]
            yield config, Job(options, entry["steps"], seed, rate, suite.looks, suite.procedure, suite.device)


def train(suite: Suite, names: Sequence[str], store: Store) -> None:
    """Train the models that the store has no recall of; and store their weights beside the measurements."""
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
        # A tied weight is one array under two names, which the format refuses: the model ties it again.
        written = {each: values for each, values in trained.weights.items() if each != "lm_head.weight"}
        save_file(written, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)  # whole or not at all
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
    """The model that is timed: of the trained ones the first at the best rate, or else as its definition says."""
    where = {"dtype": DTYPES[suite.dtype], "device": suite.device}
    model = models.build(suite.models[name]["model"], **where)
    if configs := [config for config, _ in trainings(suite, name)]:
        rate = learnability([run_of(config, store.get("recall", config) or {}) for config in configs])["rate"]
        best = next(config for config in configs if config["rate"] == rate)
        stored = {each: torch.from_numpy(values) for each, values in load_file(store.weights_of(best)).items()}
        missing, unexpected = model.load_state_dict(stored, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{name}: expected the model's weights, missing {missing}, unexpected {unexpected}")
    return model


# ---------------------------------------------------------------------------------------------------------- measurement
def measure(suite: Suite, store: Store, write_report: Callable[[], object]) -> None:
    """Measure every model once per round; the first round prints a row as soon as a model has been measured."""
    is_told = False
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
                if not is_told:
                    took = time.perf_counter() - start
                    tqdm.write(f"A round takes {took:,.0f} s; {more} more take about {more * took / 60:.0f} min.")
                    is_told = True
                write_report()


def rows_of(suite: Suite, store: Store) -> list[dict[str, Any]]:
    """The rows of the suite's models."""
    ours = {row_key(base(suite, name)) for name in suite.models}
    known = (each for each in store.found.values() if "name" in each["config"])
    return rows([each for each in known if row_key(each["config"]) in ours])


def missing_in(suite: Suite, store: Store, turn: int) -> dict[str, list[Planned]]:
    """What is left to measure in a round, by model.

    Rows are compared within a round. So a round whose times were not all taken by one run, as of a run that was killed
    or of a suite that has got another model, is timed anew as a whole.
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
    """Whether a measurement has not been found impossible in the first round."""
    first = store.get(kind, {**config, "round": 0}) if "round" in config else None
    return first is None or "reason" not in first


def measure_model(suite: Suite, name: str, missing: Sequence[Planned], store: Store, in_round: str) -> None:
    """Make some measurements of one model."""
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
    """A model's measurements of one round; bytes, which do not vary, are measured in the first one only."""
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
    """What a row says of the model itself."""
    config = model.config
    return {
        "type": config.model_type,
        "mixers": [mixer.name for mixer in config.layer_mixers] if isinstance(config, HybridAttnConfig) else None,
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
    """Samples of a function of `latency`, and its peak memory."""
    once = partial(run_pass, model, least=1, **{**options, "seconds": 0})
    peak = memory.peak_bytes(once, model.device) if with_peak else None
    return {"seconds": exact(run_pass(model, **options)), "peak_bytes": peak}


def exact(seconds: Sequence[float]) -> list[float]:
    """Samples to the nanosecond, which the clock counts in."""
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
