"""Small models on one task: what each recalls, keeps per sequence, and how fast it reads and writes.

Every row is one model of the library: the object that is scored is the one whose cache and speed are measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hybridattn.evals.recall import mqar
from hybridattn.evals.recall.parallel import Job, train_all
from hybridattn.evals.report.provenance import json_sha256
from hybridattn.evals.throughput import measure
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.accounting import cache_bytes
from hybridattn.models.decoder.cache import allocated_bytes

STATE_TOKENS = 3 * max(mqar.TEST_PAIRS)  # of the longest rows
CONTEXT = 1024  # tokens before the timed ones
BATCHES = (1, 32)


@dataclass(frozen=True)
class Entry:
    """One row: the mixers of the layers, the training steps this mix needs, and what its mixers' options change."""

    mixers: tuple[str, ...]
    steps: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


ENTRIES = {
    "softmax attention": Entry(("conv", "full"), 300),
    "sliding window 16": Entry(("conv", "window"), 600),
    "sliding window 64": Entry(("conv", "window"), 600, {"window": {"window": 64}}),
    "linear attention": Entry(("conv", "linear"), 600),
    "BASED, d' = 8": Entry(("conv", "taylor"), 600, {"taylor": {"key_dim": 8}}),
    "BASED, d' = 16": Entry(("conv", "taylor"), 400, {"taylor": {"key_dim": 16}}),
    "GLA": Entry(("conv", "gla"), 600),
    "attention-first hybrid": Entry(("conv", "full", "gla"), 300),
}

SHARED = {
    "vocab_size": mqar.VOCAB_SIZE,
    "hidden_size": 64,
    "mlp": "none",
    "initializer": "fan_in",
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "mixer_options": {
        "conv": {"kernel_size": 3, "expand": 0},
        "full": {"num_heads": 1, "rope_theta": None},
        "window": {"num_heads": 1, "rope_theta": None, "window": 16},
        "linear": {"num_heads": 1, "key_dim": 16, "feature_map": "elu"},
        "taylor": {"num_heads": 1},
        "gla": {"num_heads": 1, "key_dim": 32, "gate_bias_range": [4.0, 8.0]},
    },
}


def model_options(entry: Entry) -> dict[str, Any]:
    """The arguments of `HybridAttnConfig` for a row, with the options of the mixers it uses only."""
    shared = SHARED["mixer_options"]
    options = {name: shared[name] | entry.options.get(name, {}) for name in shared if name in entry.mixers}
    return {**SHARED, "mixers": list(entry.mixers), "mixer_options": options}


def run(*, seeds: int = 2, steps: int | None = None) -> dict[str, Any]:
    """Train every entry from ``seeds`` seeds, then measure each, one after the other with nothing else running.

    Args:
        seeds: models trained per row; recall is their median, the first one is measured.
        steps: training steps of every model instead of the entry's own.

    Returns:
        JSON values: ``rows``, each as `measure_row` gives, their ``config``, and what they share: ``seeds``,
        ``test_rows``, ``state_tokens`` (tokens behind the state bytes) and ``context`` (tokens before the timed ones).

    Raises:
        RuntimeError: a cache holds another number of bytes than the formula says.
    """
    jobs = [
        Job(model_options(entry), steps or entry.steps, seed) for entry in ENTRIES.values() for seed in range(seeds)
    ]
    weights = train_all(jobs)
    rows = []
    for i, label in enumerate(tqdm(ENTRIES, desc="measuring", unit="model")):
        trained = slice(i * seeds, (i + 1) * seeds)
        rows.append({"model": label, **measure_row(jobs[trained], weights[trained])})
    return {
        "seeds": seeds,
        "test_rows": mqar.TEST_ROWS,
        "state_tokens": STATE_TOKENS,
        "context": CONTEXT,
        "config": {row["model"]: {"model": row["config"], "steps": row["steps"]} for row in rows},
        "rows": rows,
    }


def measure_row(jobs: Sequence[Job], weights: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Score the models of one row and measure the first one, with one thread.

    Returns:
        JSON values: ``config`` and its hash, ``steps``, ``recall`` (median over the seeds) and ``recall_by_seed`` by
        number of pairs, ``parameters``, ``state_bytes`` (per sequence, after `STATE_TOKENS` tokens, by formula and as
        allocated), ``prefill`` and ``decode`` (`measure.Rate` by batch, after `CONTEXT` tokens), ``threads``.
    """
    models = [restore(job, values) for job, values in zip(jobs, weights, strict=True)]
    model = models[0]
    recalls = {str(n): [mqar.recall(each, n) for each in models] for n in mqar.TEST_PAIRS}
    states = {
        (batch, tokens): check_state(model, batch, tokens) for batch in BATCHES for tokens in (STATE_TOKENS, CONTEXT)
    }
    with threads(1):
        prefill = asdict(measure.prefill(model, tokens=CONTEXT))
        decode = {str(batch): asdict(measure.decode(model, tokens=CONTEXT, batch=batch)) for batch in BATCHES}
    return {
        "config": jobs[0].options,
        "config_sha256": json_sha256(jobs[0].options),
        "steps": jobs[0].steps,
        "recall": {n: median(values) for n, values in recalls.items()},
        "recall_by_seed": recalls,
        "parameters": model.num_parameters(),
        "state_bytes": states[1, STATE_TOKENS],
        "prefill": prefill,
        "decode": decode,
        "threads": 1,
    }


def restore(job: Job, weights: dict[str, np.ndarray]) -> HybridAttnForCausalLM:
    """The trained model of a job, in evaluation mode."""
    model = HybridAttnForCausalLM(HybridAttnConfig(**job.options))
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return model.eval()


def check_state(model: HybridAttnForCausalLM, batch: int, tokens: int) -> dict[str, int]:
    """Bytes of a cache filled with ``batch`` sequences of ``tokens`` tokens, by formula and as allocated.

    Raises:
        RuntimeError: the two differ.
    """
    assert isinstance(model.config, HybridAttnConfig)
    formula = cache_bytes(model.config, batch_size=batch, tokens=tokens, dtype=model.dtype)
    allocated = allocated_bytes(measure.filled_cache(model, tokens=tokens, batch=batch))
    if formula != allocated:
        raise RuntimeError(
            f"cache of mixers {model.config.mixers}, {batch} sequences of {tokens} tokens: expected {formula} bytes by "
            f"formula, allocated {allocated}"
        )
    return {"formula": formula, "allocated": allocated}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads per operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
