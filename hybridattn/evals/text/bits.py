"""Compute held-out bits per byte of a causal language model and of n-gram models, on the same bytes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from hybridattn.training import ngram
from hybridattn.training.byte_corpus import SEPARATOR


@dataclass(frozen=True)
class Windows:
    """Windows of a text, and the tokens in them that count towards the score.

    Attributes:
        tokens: int64 ``[windows, length + 1]``, input of the model; the last token is a target only.
        places: int64 ``[windows, length + 1]``, the index of each token in the text.
        scored: bool ``[windows, length]``, whether a target (``tokens[:, 1:]``) counts.
    """

    tokens: np.ndarray
    places: np.ndarray
    scored: np.ndarray


def scored_windows(tokens: np.ndarray, *, length: int = 512, scored: int = 256, most: int = 400) -> Windows:
    """Choose evenly spaced windows of a text; in each the last ``scored`` targets count, except separators.

    Args:
        tokens: token ids ``[time]``.
        length: tokens a model reads per window.
        scored: targets that count per window.
        most: maximum number of windows; fewer if scored spans would overlap.

    Raises:
        ValueError: the text is shorter than one window.
    """
    room = len(tokens) - length - 1
    if room < 0:
        raise ValueError(f"tokens: expected at least {length + 1} (one window), got {len(tokens)}")
    starts = np.linspace(0, room, max(1, min(most, room // scored))).astype(np.int64)
    places = starts[:, None] + np.arange(length + 1)
    text = tokens[places].astype(np.int64)
    counts = np.arange(1, length + 1) > length - scored
    return Windows(text, places, counts & (text[:, 1:] != SEPARATOR))


@torch.inference_mode()
def model_bits_per_byte(model: PreTrainedModel, windows: Windows, *, batch: int = 16) -> float:
    """Compute the bits per byte of a causal language model, in the dtype of its parameters.

    Args:
        model: a causal language model over the same token ids, in evaluation mode.
        windows: windows to score.
        batch: windows per forward pass.
    """
    nats = 0.0
    for first in tqdm(range(0, len(windows.tokens), batch), desc="held-out text", unit="batch"):
        tokens = torch.from_numpy(windows.tokens[first : first + batch]).to(model.device)
        scored = torch.from_numpy(windows.scored[first : first + batch]).to(model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        nats += F.cross_entropy(logits[scored].float(), tokens[:, 1:][scored], reduction="sum").item()
    return nats / math.log(2) / int(windows.scored.sum())


def ngram_bits_per_byte(train: np.ndarray, held_out: np.ndarray, windows: Windows, *, orders: int = 5) -> list[float]:
    """Compute the bits per byte of interpolated Witten-Bell models of orders 0 to ``orders - 1``.

    Args:
        train: token ids ``[time]`` to count.
        held_out: the text of ``windows``, token ids ``[time]``.
        windows: windows to score.
        orders: number of models.
    """
    counts = [ngram.count(train, order=order) for order in tqdm(range(orders), desc="n-gram models", unit="order")]
    return ngram.bits_per_token(counts, held_out, windows.places[:, 1:][windows.scored])
