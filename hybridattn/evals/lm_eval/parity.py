"""Parity gates, checked before scoring: a model's logits must not depend on caching, padding or prefill.

The gates call `generate`, as the evaluation does, so that they apply to any model of transformers. A logits processor
forces `generate` to take given tokens. The logits of these steps are compared with those of another way to compute
them, for instance of one forward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

PROMPT = 96  # tokens; more than one chunk of the linear operators
STEPS = 8
PADDING = 37

# Maximum relative L2 error of a position's logits. Correct small models have 2e-6 in fp32 and up to 3e-2 in bf16, deep
# ones somewhat more; fp64 models have fp32 states. Incorrect models differ by several tenths.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Result(NamedTuple):
    """Result of a gate: its largest error, and the tolerance for it."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, and not nan."""
        return self.error <= self.tolerance


class Follow(LogitsProcessor):
    """Force generation of the given tokens ``[rows, STEPS]`` after a prompt of ``prompt`` tokens."""

    def __init__(self, tokens: Tensor, prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step, None], 0.0)


@torch.inference_mode()
def check(model: Any, *, max_length: int | None = None, seed: int = 0) -> dict[str, Result]:
    """Check a causal language model with all gates, on random tokens.

    Args:
        model: a generative model of transformers, in evaluation mode.
        max_length: maximum input length of the model in tokens; shortens the prompts if needed.
        seed: seed of the tokens.

    Returns:
        The results by gate: ``"cached = uncached"``, generation with and without cache; ``"padded = unpadded"``, a row
        that is padded on the left next to a longer row, and the row alone; ``"prefill + decode = forward"``, a prompt
        and steps of one token, and one pass over all of these tokens.

    Raises:
        ValueError: ``max_length`` is too short for the gates.
    """
    prompt = min(PROMPT, (max_length or PROMPT + STEPS) - STEPS)
    padding = min(PADDING, prompt // 2)
    if padding < 1:
        raise ValueError(f"max_length: expected at least {STEPS + 2} for the parity gates, got {max_length}")
    rows = random_tokens(model, prompt + STEPS, seed)
    alone = rows[:1, padding:]
    padded = rows.clone()
    padded[0, :padding] = pad_token(model)
    mask = torch.ones_like(rows[:, :prompt])
    mask[0, :padding] = 0

    cached = stepwise(model, rows, None)
    pairs = {
        "cached = uncached": (cached, stepwise(model, rows, None, use_cache=False)),
        "padded = unpadded": (stepwise(model, padded, mask)[:1], stepwise(model, alone, None)),
        "prefill + decode = forward": (cached, model(rows).logits[:, -STEPS - 1 : -1]),
    }
    return {gate: Result(error(*pair), TOLERANCE[model.dtype]) for gate, pair in pairs.items()}


def random_tokens(model: Any, length: int, seed: int) -> Tensor:
    """Draw two rows without padding and end tokens, int64 ``[2, length]``."""
    special = {pad_token(model)}
    for config in (model.config, model.generation_config):
        end = getattr(config, "eos_token_id", None)
        special |= set(end if isinstance(end, list) else [end])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(allowed), (2, length), generator=torch.Generator().manual_seed(seed))
    return allowed[drawn].to(model.device)


def pad_token(model: Any) -> int:
    """Return the padding token, which must not affect the outputs of a model."""
    token = model.config.pad_token_id
    return 0 if token is None else token


def stepwise(model: Any, rows: Tensor, mask: Tensor | None, *, use_cache: bool = True) -> Tensor:
    """Return the logits ``[rows, STEPS, vocabulary]`` of ``generate``, forced to produce the rows' last tokens."""
    prompt = rows[:, :-STEPS]
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 1, "use_cache": use_cache}
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        generation_config=GenerationConfig(
            **options, pad_token_id=pad_token(model), return_dict_in_generate=True, output_logits=True
        ),
        logits_processor=LogitsProcessorList([Follow(rows[:, -STEPS:], prompt.shape[1])]),
    )
    return torch.stack(out.logits, 1)


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest relative L2 distance of the logits of a position, minus their mean, which softmax ignores."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    distance = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return float(distance.nan_to_num(torch.inf).max())
