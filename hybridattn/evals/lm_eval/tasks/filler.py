"""Real text that hides the facts of a prompt: the Python standard library's sources, nothing is downloaded."""

import hashlib
import re
from functools import cache

import numpy as np

from hybridattn.training.byte_corpus import SEPARATOR, standard_library


@cache
def local_text() -> str:
    """The standard library's sources without empty lines, held-out files first; the same for one Python release."""
    corpus = standard_library()
    tokens = np.concatenate([corpus.held_out, corpus.train])
    # A separator between files becomes the end of a line.
    text = np.where(tokens == SEPARATOR, ord("\n"), tokens).astype(np.uint8).tobytes().decode("utf-8", "replace")
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


@cache
def sha256() -> str:
    """The text's hash, which names the prompts together with task, seed and length."""
    return hashlib.sha256(local_text().encode()).hexdigest()


@cache
def vocabulary() -> frozenset[str]:
    """The lower-case words of the text: a key that is none of them stands in no filler."""
    return frozenset(re.findall("[a-z]+", local_text().lower()))


def line_start(share: float) -> int:
    """The place of the first line that begins after ``share`` (0 to 1) of the text."""
    return local_text().find("\n", int(share * (len(local_text()) - 1))) + 1


def excerpt(start: int, size: int) -> str:
    """``size`` characters from ``start`` on, beginning anew where the text ends."""
    text = local_text()
    piece = text[start : start + size]
    rounds, rest = divmod(size - len(piece), len(text))
    return piece + rounds * text + text[:rest]
