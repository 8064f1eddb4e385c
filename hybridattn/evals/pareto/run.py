"""Carrying out a suite: train what has to be trained, then time everything in rounds, one thing at a time.

Every figure is a cell, written as soon as it is there and looked up before it is made, so a run that was killed goes
on, and parts of a suite on several machines make one report.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from hybridattn.evals.pareto.suite import DTYPES, Suite
from hybridattn.evals.recall.learnability import steps_to_threshold
from hybridattn.evals.recall.training_pool import Job, Trained, train_all
from hybridattn.evals.report import cells
from hybridattn.evals.report.rows import BASE, rows
from hybridattn.evals.speed import measure, memory, subjects
from hybridattn.evals.speed.calm import Probe, keep_freed_memory
from hybridattn.evals.speed.statistics import LEAST, TOLERANCE
from hybridattn.measure.provenance import cpu_name
from hybridattn.models.decoder import HybridAttnConfig

ENOUGH = 10.0  # seconds of undisturbed samples of one figure
LOOK = 10  # extra rounds from one look at the intervals to the next
Figure = tuple[str, str, int, int, bool]
"""Name of the model, kind, tokens, batch, and whether in a CUDA graph."""
Cell = tuple[str, dict[str, Any], Callable[[PreTrainedModel], dict[str, Any]]]
"""Kind, configuration, and what is measured of the model."""


def run(suite: Suite, out: Path, *, shard: tuple[int, int] = (1, 1), again: bool = False) -> None:
    """Measure what ``out`` does not have yet.

    Args:
        suite: what to measure.
        out: the folder of cells, weights and, later, the report.
        shard: (i, n): the i-th of n parts, from 1: every n-th model, beginning with the i-th; the operators are in the
            first part.
        again: measure what is there, too.

    Raises:
        ValueError: a part that there is not, or a GPU that there is not; or as `cells.check_output`.
    """
    cells.check_output(out)
    part, parts = shard
    if not 1 <= part <= parts:
        raise ValueError(f"shard: expected i/n with 1 <= i <= n, got {part}/{parts}")
    if part > len(suite.models):
        raise ValueError(f"shard: expected a part with a model, there are {len(suite.models)}, got {part}/{parts}")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' without a GPU, got 'cuda'")
    names = list(suite.models)[part - 1 :: parts]
    if again:
        forget(suite, names, out)
    train(suite, names, out, again)
    for turn in tqdm(range(suite.rounds), desc="measuring", unit="round"):
        do_round(suite, names, turn, out, again)
    for first in range(suite.rounds, suite.rounds + suite.extra_rounds, LOOK):
        wide = too_wide(suite, names, out)
        print(f"after {first} rounds, intervals wider than {suite.width:.0%} of their medians: {len(wide)}")
        if not wide:
            break
        for turn in range(first, min(first + LOOK, suite.rounds + suite.extra_rounds)):
            do_round(suite, names, turn, out, again, wide)
    if suite.operators and part == 1:
        from hybridattn.workshop import contest

        kernels = out / cells.KERNELS
        if again:
            kernels.unlink(missing_ok=True)
        with threads(suite.threads):
            contest.run(suite.device, suite.device == "cuda", out=kernels)


def device_name(suite: Suite) -> str:
    """The name of what the suite runs on."""
    return torch.cuda.get_device_name() if suite.device == "cuda" else cpu_name()


def base(suite: Suite, name: str) -> dict[str, Any]:
    """What all cells of a row have in common; its hash is the row's."""
    entry = suite.models[name]
    trained = {"procedure": suite.procedure, "steps": entry["steps"]} if entry["steps"] else None
    common = {"name": name, "model": entry["model"], "train": trained, "device": device_name(suite)}
    return {**common, "dtype": suite.dtype, "threads": suite.threads}


# ------------------------------------------------------------------------------------------------------------- training
def trainings(suite: Suite, name: str) -> Iterator[tuple[dict[str, Any], Job]]:
    """The configurations of a model's recall cells and the jobs that fill them, the one that is timed first."""
    entry = suite.models[name]
    for rate in suite.rates if entry["steps"] else ():
        for seed in suite.seeds:
            config = {**base(suite, name), "seed": seed, "rate": rate, "looks": suite.looks}
            options = entry["model"]["config"]
            yield config, Job(options, entry["steps"], seed, rate, suite.looks, suite.procedure, suite.device)


def train(suite: Suite, names: Sequence[str], out: Path, again: bool) -> None:
    """Train what there is no recall cell of; its weights are kept beside the cells."""
    wanted = [
        each
        for name in names
        for each in trainings(suite, name)
        if again or not (cells.path_of(out, "recall", each[0]).exists() and weights_of(out, each[0]).exists())
    ]

    def keep(index: int, trained: Trained) -> None:
        config = wanted[index][0]
        file = weights_of(out, config)
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
        cells.write(out, "recall", config, figures, device=device_name(suite))

    train_all([job for _, job in wanted], keep)


def weights_of(out: Path, config: dict[str, Any]) -> Path:
    """The file of a trained model's weights."""
    return out / "weights" / f"{cells.key('recall', config)}.safetensors"


def model_of(suite: Suite, name: str, out: Path) -> PreTrainedModel:
    """The model that is timed: the one that was trained first, or else as its definition says."""
    where = {"dtype": DTYPES[suite.dtype], "device": suite.device}
    model = subjects.build(suite.models[name]["model"], **where)
    first = next(trainings(suite, name), None)
    if first is not None:
        stored = {each: torch.from_numpy(values) for each, values in load_file(weights_of(out, first[0])).items()}
        missing, unexpected = model.load_state_dict(stored, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{name}: expected the model's weights, missing {missing}, unexpected {unexpected}")
    return model


# ---------------------------------------------------------------------------------------------------------- measurement
def too_wide(suite: Suite, names: Sequence[str], out: Path) -> set[Figure]:
    """What has an interval wider than the suite wants it."""
    ours = [base(suite, name) for name in names]
    return {
        (row["config"]["name"], kind, each["tokens"], each["batch"], each["graph"])
        for row in rows(cells.read(out))
        if row["config"] in ours
        for kind in ("prefill", "decode", "training")
        for each in row[kind]
        if "median" in each and each["high"] - each["low"] > suite.width * each["median"]
    }


def do_round(
    suite: Suite, names: Sequence[str], turn: int, out: Path, again: bool, only: set[Figure] | None = None
) -> None:
    """Fill the cells of one round, or ``only`` some, in a process of its own where the suite wants one."""
    if not any(to_measure(suite, name, turn, out, again, only) for name in names):
        return
    if suite.apart:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(measure_round, suite, names, turn, out, again, only).result()
    else:
        measure_round(suite, names, turn, out, again, only)


def to_measure(
    suite: Suite,
    name: str,
    turn: int,
    out: Path,
    again: bool,
    only: set[Figure] | None = None,
    probe: Probe | None = None,
) -> list[Cell]:
    """What is left to measure of a model in one round."""
    return [
        (kind, config, call)
        for kind, config, call in plan(suite, name, turn, probe)
        if (again or not cells.path_of(out, kind, config).exists())
        and (only is None or figure_of(name, kind, config) in only)
        and not is_settled(out, kind, config)
    ]


def figure_of(name: str, kind: str, config: dict[str, Any]) -> Figure:
    """What a timed cell is one of several rounds of."""
    return name, kind, config["tokens"], config["batch"], config.get("graph", False)


def measure_round(
    suite: Suite, names: Sequence[str], turn: int, out: Path, again: bool, only: set[Figure] | None = None
) -> None:
    """Fill the cells of one round."""
    with threads(suite.threads):
        probe = None
        if suite.device == "cpu":
            keep_freed_memory()
            probe = Probe()
        for name in names:
            if left := to_measure(suite, name, turn, out, again, only, probe):
                measure_model(suite, name, left, out)


def measure_model(suite: Suite, name: str, left: Sequence[Cell], out: Path) -> None:
    """Fill cells of one model."""
    model = model_of(suite, name, out)
    most = measure.positions(model)
    for kind, config, call in left:
        tokens = config.get("tokens", 0) + (measure.MOST_STEPS + 2 if kind == "decode" else 0)
        try:
            figures = {"reason": f"it has {most} positions"} if most is not None and tokens > most else call(model)
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            figures = {"reason": "out of memory"}
        cells.write(out, kind, config, figures, device=device_name(suite))


def is_settled(out: Path, kind: str, config: dict[str, Any]) -> bool:
    """Whether a figure needs no more rounds: it has `ENOUGH` seconds of undisturbed samples, or cannot be measured."""
    earlier = [cells.path_of(out, kind, {**config, "round": turn}) for turn in range(config.get("round", 0))]
    taken = [json.loads(file.read_text(encoding="utf-8"))["figures"] for file in earlier if file.exists()]
    if any("reason" in each for each in taken):
        return True
    probes = [x for each in taken for x in each["probe"]]
    pairs = zip((x for each in taken for x in each["seconds"]), probes, strict=True)
    calm = [seconds for seconds, probe in pairs if probe <= TOLERANCE * min(probes)]
    return len(calm) >= LEAST and sum(calm) >= ENOUGH


def forget(suite: Suite, names: Sequence[str], out: Path) -> None:
    """Remove what was timed of the named models, in however many rounds."""
    ours = [base(suite, name) for name in names]
    for cell in cells.read(out) if (out / cells.CELLS).is_dir() else ():
        config = cell["config"]
        if "round" in config and {key: config[key] for key in BASE} in ours:
            cells.path_of(out, cell["kind"], config).unlink()


def plan(suite: Suite, name: str, turn: int, probe: Probe | None = None) -> Iterator[Cell]:
    """A model's cells of one round; what is no time is measured in the first one only."""
    common = base(suite, name)
    sampling = {"least": -(-suite.least // suite.rounds), "seconds": suite.seconds, "probe": probe}
    if turn == 0:
        yield "model", common, facts
        for tokens in suite.state:
            yield "state", {**common, "tokens": tokens}, partial(memory.cache_sizes, tokens=tokens)
    timed = {**common, "round": turn}
    for tokens in suite.prefill:
        call = partial(timed_prefill, tokens=tokens, with_peak=turn == 0, **sampling)
        yield "prefill", {**timed, "tokens": tokens, "batch": 1}, call
    for tokens, batch in suite.decode:
        for graph in (False, True) if suite.graphs else (False,):
            call = partial(timed_decode, tokens=tokens, batch=batch, graph=graph, **sampling)
            yield "decode", {**timed, "tokens": tokens, "batch": batch, "graph": graph}, call
    for tokens in suite.training:
        call = partial(timed_training, tokens=tokens, with_peak=turn == 0, **sampling)
        yield "training", {**timed, "tokens": tokens, "batch": 1}, call
    if turn == 0 and suite.memory is not None:
        yield "largest_batch", {**common, **suite.memory}, partial(memory.largest_batch, **suite.memory)


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a row says of the model itself."""
    config = model.config
    return {
        "type": config.model_type,
        "mixers": list(config.mixers) if isinstance(config, HybridAttnConfig) else None,
        "reach": _reach(config) if isinstance(config, HybridAttnConfig) else None,
        "attn_implementation": config._attn_implementation,
        "attention_operators": measure.attention_operators(model),
        "parameters": model.num_parameters(),
        "weight_bytes": memory.weight_bytes(model),
    }


def _reach(config: HybridAttnConfig) -> int | None:
    """Tokens after which the cache of a model declares to grow no more; None if it always does."""
    if "full" in config.mixers:
        return None
    options = config.mixer_options or {}
    return max([1, *(options.get(name, {}).get("window") or 1 for name in config.mixers)])


def timed_prefill(model: PreTrainedModel, *, tokens: int, with_peak: bool, **sampling: Any) -> dict[str, Any]:
    """Samples of prefill, and its peak memory."""
    prompt = measure.random_prompt(model, 1, tokens)
    with torch.inference_mode():
        peak = memory.peak_bytes(lambda: measure.read(model, prompt), model.device) if with_peak else None
    return {**measure.prefill(model, tokens=tokens, **sampling)._asdict(), "peak_bytes": peak}


def timed_decode(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Samples of decoding steps."""
    return measure.decode(model, **options)._asdict()


def timed_training(model: PreTrainedModel, *, tokens: int, with_peak: bool, **sampling: Any) -> dict[str, Any]:
    """Samples of forward and backward, and their peak memory."""
    once = partial(measure.training, model, tokens=tokens, least=1, seconds=0)
    peak = memory.peak_bytes(once, model.device) if with_peak else None
    return {**measure.training(model, tokens=tokens, **sampling)._asdict(), "peak_bytes": peak}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads per operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
