"""Prefill and decode speed of a Hugging Face causal language model, and the bytes its cache holds.

Prefill and decode are timed apart, after a warm-up, in inference mode, on whatever device and with as many threads as
the caller set. Every sample is one call of the model.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Rate:
    """Tokens per second over all sequences of a batch.

    Attributes:
        median: at the median time of the samples.
        p90: at the 90th percentile of their times: nine calls of ten are at least this fast.
        samples: number of timed calls.
    """

    median: float
    p90: float
    samples: int


@torch.inference_mode()
def prefill(model: PreTrainedModel, *, tokens: int, batch: int = 1, samples: int = 10, warmup: int = 2) -> Rate:
    """Time reading a whole prompt into an empty cache, logits of the last position only.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length.
        batch: sequences per call.
        samples: timed calls, at least 10.
        warmup: calls before them.
    """
    prompt = random_prompt(model, batch, tokens)
    return rate(lambda: read(model, prompt), work=batch * tokens, samples=samples, warmup=warmup)


@torch.inference_mode()
def decode(model: PreTrainedModel, *, tokens: int, batch: int = 1, samples: int = 50, warmup: int = 5) -> Rate:
    """Time greedy decoding, one token per sequence and call, after a prompt.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length; the cache grows by one with every call.
        batch: sequences decoded together.
        samples: timed calls, at least 10.
        warmup: calls before them.
    """
    cache, last = read(model, random_prompt(model, batch, tokens))

    def step() -> None:
        nonlocal last
        last = next_token(model(input_ids=last, past_key_values=cache, use_cache=True).logits)

    return rate(step, work=batch, samples=samples, warmup=warmup)


@torch.inference_mode()
def filled_cache(model: PreTrainedModel, *, tokens: int, batch: int = 1) -> DynamicCache:
    """The cache after a prompt of ``tokens`` tokens in each of ``batch`` sequences."""
    return read(model, random_prompt(model, batch, tokens))[0]


def random_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Token ids ``[batch, tokens]``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def read(model: PreTrainedModel, prompt: Tensor) -> tuple[DynamicCache, Tensor]:
    """Read a prompt ``[batch, tokens]``; returns the cache and the greedy next token ``[batch, 1]``."""
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, next_token(logits)


def next_token(logits: Tensor) -> Tensor:
    """The most likely token after the last position, ``[batch, time, vocab] -> [batch, 1]``."""
    return logits[:, -1:].argmax(-1)


def rate(call: Callable[[], object], *, work: int, samples: int, warmup: int) -> Rate:
    """Time ``call``, which handles ``work`` tokens, ``samples`` times after ``warmup`` untimed calls.

    Raises:
        ValueError: fewer than 10 samples, from which no 90th percentile can be read.
    """
    if samples < 10:
        raise ValueError(f"samples: expected at least 10, got {samples}")
    for _ in range(warmup):
        call()
    times = sorted(timed(call) for _ in range(samples))
    median = (times[(samples - 1) // 2] + times[samples // 2]) / 2
    return Rate(work / median, work / times[math.ceil(0.9 * samples) - 1], samples)


def timed(call: Callable[[], object]) -> float:
    """Seconds that one call takes, work queued on a GPU included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
