"""How long a Hugging Face causal language model takes for prefill, decoding and training.

Each is timed apart, after a warm-up, on the model's device and with as many threads as the caller set. A sample is the
seconds of one call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from hybridattn.measure.timing import sample

MOST_STEPS = 200  # calls of one decoding, whose context grows with each


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    *,
    tokens: int,
    batch: int = 1,
    least: int = 3,
    seconds: float = 0.2,
) -> list[float]:
    """Seconds from a whole prompt to its first new token, from an empty cache; logits of the last position only.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length.
        batch: sequences per call.
        least, seconds: as in `timing.sample`.
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
    """Seconds of a greedy decoding step, one token per sequence, after a prompt.

    Args:
        model: a causal language model in evaluation mode.
        tokens: prompt length; the cache grows by one with every call.
        batch: sequences decoded together. All are copies of one; this does not affect the time.
        graph: replay the step as a CUDA graph, on a static cache.
        least, seconds: as in `timing.sample`, with at most `MOST_STEPS` calls.

    Raises:
        ValueError: a graph without a GPU.
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
    """Seconds of forward and backward on rows of tokens, without an optimiser; arguments as in `prefill`."""
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
    """A decoding step after a prompt, captured: calling it replays the graph.

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
    """The cache after a prompt of ``tokens`` tokens, ``batch`` times, and the next tokens ``[batch, 1]``."""
    cache, last = read(model, random_prompt(model, 1, tokens))
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache, last.repeat(batch, 1)


def random_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Token ids ``[batch, tokens]``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def read(model: PreTrainedModel, prompt: Tensor, cache: Cache | None = None) -> tuple[Cache, Tensor]:
    """Read a prompt ``[batch, tokens]``; returns the cache and the greedy next token ``[batch, 1]``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, next_token(logits)


def next_token(logits: Tensor) -> Tensor:
    """The most likely token after the last position, ``[batch, time, vocab] -> [batch, 1]``."""
    return logits[:, -1:].argmax(-1)


def positions(model: PreTrainedModel) -> int | None:
    """The number of positions that a model has learned embeddings of, beyond which it cannot read; None for others."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [x for x in model.modules() if isinstance(x, nn.Embedding) and x is not model.get_input_embeddings()]
    # OPT's table has two more rows.
    return most if most is not None and any(0 <= x.num_embeddings - most <= 2 for x in tables) else None


class _Names(TorchDispatchMode):
    """The names of the operators that run, in `names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()  # in inference mode SDPA would not say which of its kernels runs
def attention_operators(model: PreTrainedModel) -> list[str]:
    """Names of the operators of a short prefill that are attention: what PyTorch's SDPA chose has a name of its own."""
    with _Names() as seen:
        read(model, random_prompt(model, 1, 64))
    return sorted(name for name in seen.names if "attention" in name or name.startswith("hybridattn::"))
