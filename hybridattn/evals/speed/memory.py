"""Measure cache sizes, peak memory of calls, and the largest batch within a memory budget, in bytes."""

import json
from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hybridattn.evals.speed import latency
from hybridattn.models.decoder import HybridAttnConfig
from hybridattn.models.decoder.cache import MixerCacheLayer, allocated_bytes
from hybridattn.models.decoder.sizes import cache_bytes


def cache_sizes(model: PreTrainedModel, *, tokens: int, batch: int = 1) -> dict[str, int | None]:
    """Measure the cache of ``batch`` sequences after ``tokens`` tokens, in bytes.

    Returns:
        ``allocated``, the measured size; ``formula``, the size that a model of this package declares, or None for other
        models.
    """
    cache, _ = latency.filled(model, tokens=tokens, batch=batch)
    config, formula = model.config, None
    if isinstance(config, HybridAttnConfig):
        formula = cache_bytes(config, batch_size=batch, tokens=tokens, dtype=model.dtype)
    return {"allocated": bytes_of(cache), "formula": formula}


def bytes_of(cache: Cache) -> int:
    """Return the bytes of all tensors in a cache of any model; a storage counts whole, and once."""
    if all(isinstance(layer, MixerCacheLayer) for layer in cache.layers):
        return allocated_bytes(cache)
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(vars(cache).values())}
    return sum(found.values())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif type(value).__module__.startswith("transformers."):  # a layer of the cache
            yield from _tensors(vars(value).values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak bytes of tensors that a call allocates, beyond the tensors allocated before it.

    Temporary tensors of operators are counted; memory that libraries allocate without PyTorch is not. The source is the
    allocator on a GPU and PyTorch's profiler on a CPU. Other devices give None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        call()
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=itemgetter("ts"))
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def largest_batch(model: PreTrainedModel, *, tokens: int, budget: int, most: int = 1 << 16) -> dict[str, Any]:
    """Find the largest number of sequences that can be decoded within a memory budget, after a prompt each.

    The batch size is doubled until a batch does not fit, then bisected. A batch fits if the peak of weights, caches and
    a decoding step is within the budget; a batch that runs out of memory does not fit.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length.
        budget: memory budget in bytes.
        most: largest batch size to try.

    Returns:
        ``batch`` (0 if not even one sequence fits) and ``tried``, a list of ``batch`` and ``bytes`` (None if memory
        ran out).
    """
    weights, tried = weight_bytes(model), []

    def fits(batch: int) -> bool:
        taken = _attempt(lambda: _one_step(model, tokens, batch), model.device)
        tried.append({"batch": batch, "bytes": None if taken is None else weights + taken})
        return taken is not None and weights + taken <= budget

    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"batch": good, "tried": tried}


@torch.inference_mode()
def _one_step(model: PreTrainedModel, tokens: int, batch: int) -> None:
    cache, last = latency.filled(model, tokens=tokens, batch=batch)
    model(input_ids=last, past_key_values=cache, use_cache=True)


def _attempt(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak bytes of a call, or None if memory ran out.

    Raises:
        RuntimeError: peak memory cannot be measured on this device.
    """
    try:
        taken = peak_bytes(call, device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    if taken is None:
        raise RuntimeError(f"largest_batch: expected a CUDA GPU or a CPU, to measure peak memory, got {device.type}")
    return taken


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of a GPU or of a CPU."""
    is_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)
