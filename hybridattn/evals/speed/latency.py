"""Time prefill, decoding steps and training passes of Hugging Face causal language models.

Each is timed separately, after a warm-up, on the model's device and with the caller's number of threads. A sample is
the duration of one call in seconds.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from hybridattn.measure.timing import sample

MOST_STEPS = 200  # decoding steps per measurement: each one makes the context longer


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    *,
    tokens: int,
    batch: int = 1,
    least: int = 3,
    seconds: float = 0.2,
) -> list[float]:
    """Time a prefill: from a prompt and an empty cache to the first new token. Returns samples in seconds.

    Only the logits of the last position are computed.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length.
        batch: sequences per call.
        least, seconds: fewest samples and their least total time, as in `timing.sample`.
    """
    prompt = random_prompt(model, batch, tokens)
    return sample(lambda: read(model, prompt), least=least, seconds=seconds)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    *,
    tokens: int,
    batch: int = 1,
    graph: bool = False,
    least: int = 3,
    seconds: float = 0.2,
) -> list[float]:
    """Time greedy decoding steps, one token per sequence, after a prompt. Returns samples in seconds.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length; every call adds one token to the cache.
        batch: sequences decoded together. All are copies of one, which does not affect the time.
        graph: replay the step as a CUDA graph, on a static cache.
        least, seconds: as in `timing.sample`, with at most `MOST_STEPS` calls.

    Raises:
        ValueError: ``graph`` without a GPU.
    """
    if graph:
        step = graphed_step(model, tokens, batch)
    else:
        cache, last = filled(model, tokens=tokens, batch=batch)

        def step() -> None:
            nonlocal last
            last = next_token(model(input_ids=last, past_key_values=cache, use_cache=True).logits)

    return sample(step, least=least, seconds=seconds, most=MOST_STEPS)


def training(
    model: PreTrainedModel,
    *,
    tokens: int,
    batch: int = 1,
    least: int = 3,
    seconds: float = 0.2,
) -> list[float]:
    """Time forward and backward passes on rows of ``tokens`` tokens, without an optimiser; otherwise as `prefill`."""
    rows = random_prompt(model, batch, tokens)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    model.train()
    try:
        return sample(step, least=least, seconds=seconds)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def graphed_step(model: PreTrainedModel, tokens: int, batch: int) -> Callable[[], None]:
    """Capture a decoding step after a prompt as a CUDA graph; the returned function replays it.

    Raises:
        ValueError: the model is not on a GPU.
    """
    if model.device.type != "cuda":
        raise ValueError(f"graph: expected a model on a GPU, got {model.device}")
    cache = StaticCache(config=model.config, max_cache_len=tokens + MOST_STEPS + 8)
    _, last = read(model, random_prompt(model, batch, tokens), cache)

    def step() -> None:
        last.copy_(next_token(model(input_ids=last, past_key_values=cache, use_cache=True).logits))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


@torch.inference_mode()
def filled(model: PreTrainedModel, *, tokens: int, batch: int = 1) -> tuple[Cache, Tensor]:
    """Return the cache of a random prompt, repeated ``batch`` times, and the next tokens ``[batch, 1]``."""
    cache, last = read(model, random_prompt(model, 1, tokens))
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache, last.repeat(batch, 1)


def random_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Return random token ids ``[batch, tokens]``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def read(model: PreTrainedModel, prompt: Tensor, cache: Cache | None = None) -> tuple[Cache, Tensor]:
    """Prefill a prompt ``[batch, tokens]``; return the cache and the greedy next tokens ``[batch, 1]``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, next_token(logits)


def next_token(logits: Tensor) -> Tensor:
    """Return the most likely token after the last position, ``[batch, time, vocab] -> [batch, 1]``."""
    return logits[:, -1:].argmax(-1)


def positions(model: PreTrainedModel) -> int | None:
    """Return the number of learned position embeddings, which limits the input; None for a model without any."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [x for x in model.modules() if isinstance(x, nn.Embedding) and x is not model.get_input_embeddings()]
    # OPT's embedding table has two rows more than max_position_embeddings.
    return most if most is not None and any(0 <= x.num_embeddings - most <= 2 for x in tables) else None


class _Names(TorchDispatchMode):
    """Record the names of the operators that run in this mode, in `names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()  # in inference mode SDPA does not dispatch to a separate operator per kernel
def attention_operators(model: PreTrainedModel) -> list[str]:
    """Return the names of the attention operators in a short prefill; they show which kernel PyTorch's SDPA chose."""
    with _Names() as seen:
        read(model, random_prompt(model, 1, 64))
    return sorted(name for name in seen.names if "attention" in name or name.startswith("hybridattn::"))
