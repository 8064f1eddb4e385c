"""Filler text that surrounds the facts of a prompt: the sources of Python's standard library, without a download."""

import hashlib
import re
from functools import cache

import numpy as np

from hybridattn.training.byte_corpus import SEPARATOR, standard_library


@cache
def local_text() -> str:
    """Return the library's sources without empty lines, held-out files first; it depends only on the Python release."""
    corpus = standard_library()
    tokens = np.concatenate([corpus.held_out, corpus.train])
    # A separator between files becomes a newline.
    text = np.where(tokens == SEPARATOR, ord("\n"), tokens).astype(np.uint8).tobytes().decode("utf-8", "replace")
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


@cache
def sha256() -> str:
    """Return the text's hash; together with task, seed and length it identifies the prompts."""
    return hashlib.sha256(local_text().encode()).hexdigest()


@cache
def vocabulary() -> frozenset[str]:
    """Return the words of the text in lower case; a key that is not among them occurs in no filler."""
    return frozenset(re.findall("[a-z]+", local_text().lower()))


def line_start(share: float) -> int:
    """Return the character index of the first line that starts after a share (0 to 1) of the text."""
    return local_text().find("\n", int(share * (len(local_text()) - 1))) + 1


def excerpt(start: int, size: int) -> str:
    """Return ``size`` characters from ``start`` on, continuing at the beginning where the text ends."""
    text = local_text()
    piece = text[start : start + size]
    rounds, rest = divmod(size - len(piece), len(text))
    return piece + rounds * text + text[:rest]
