"""Measure bits per token by position in the sequence, at the training length of a model and at longer lengths."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hybridattn.training.byte_corpus import SEPARATOR, standard_library


@torch.inference_mode()
def bits_by_position(
    model: PreTrainedModel, tokens: np.ndarray, *, length: int, windows: int = 8
) -> list[dict[str, Any]]:
    """Compute the bits per token of a causal language model in windows of a text, by position in the window.

    Args:
        model: a causal language model in evaluation mode.
        tokens: token ids ``[time]`` of one text.
        length: input tokens per window.
        windows: maximum number of evenly spaced windows; fewer if they would overlap.

    Returns:
        JSON values for positions 0 to 31, 32 to 63, 64 to 127, and so on: ``first`` and ``last`` position, ``bits`` per
        token, and ``tokens``, the number of tokens in the mean.

    Raises:
        ValueError: the text is shorter than one window.
    """
    room = len(tokens) - length - 1
    if length < 1 or room < 0:
        raise ValueError(f"tokens: expected at least {length + 1} (one window), got {len(tokens)}")
    starts = np.linspace(0, room, max(1, min(windows, len(tokens) // (length + 1)))).astype(np.int64)
    nats = torch.zeros(length, dtype=torch.float64)
    for start in tqdm(starts, desc=f"text, {length} tokens", unit="window"):
        text = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64)).to(model.device)
        hidden = model.base_model(input_ids=text[None, :-1], use_cache=False).last_hidden_state[0]
        head: Any = model.get_output_embeddings()
        for first in range(0, length, 1024):  # in chunks, since the logits of all tokens may not fit in memory
            logits = head(hidden[first : first + 1024]).float()
            loss = F.cross_entropy(logits, text[1 + first : 1 + first + len(logits)], reduction="none")
            nats[first : first + len(logits)] += loss.double().cpu()
    edges = [0, *(e for e in (2**i for i in range(5, 40)) if e < length), length]
    return [
        {
            "first": first,
            "last": last - 1,
            "bits": nats[first:last].mean().item() / len(starts) / math.log(2),
            "tokens": (last - first) * len(starts),
        }
        for first, last in pairwise(edges)
    ]


def extrapolation(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    trained: int,
    factors: Sequence[int] = (1, 2, 4, 8, 16),
    windows: int = 8,
) -> dict[str, list[dict[str, Any]]]:
    """Compute ``bits_by_position`` at multiples of the training length; the keys are lengths as strings.

    Args:
        trained: training length in tokens.
        factors: multiples of the training length; lengths beyond the text are skipped, except the first.
        model, tokens, windows: as in ``bits_by_position``.
    """
    lengths = [trained * f for f in factors]
    fitting = [lengths[0], *(length for length in lengths[1:] if length < len(tokens))]
    return {str(length): bits_by_position(model, tokens, length=length, windows=windows) for length in fitting}


def extrapolation_of(name: str, trained: int, **options: Any) -> dict[str, Any]:
    """Compute ``extrapolation`` for a checkpoint, on the held-out sources of Python's standard library as one text.

    Args:
        name: the checkpoint's folder, or its name on the Hub.
        trained: its training length, in its own tokens.
        options: arguments of ``from_pretrained``, such as ``trust_remote_code``.

    Returns:
        JSON values: ``trained``, ``bytes_per_token`` of the text, and ``lengths``, the result of ``extrapolation``.

    Raises:
        ValueError: the text is shorter than ``trained``.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    held_out = standard_library().held_out
    text = held_out[held_out != SEPARATOR].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    tokens = np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return {
        "trained": trained,
        "bytes_per_token": len(text.encode()) / len(tokens),
        "lengths": extrapolation(model, tokens, trained=trained),
    }
