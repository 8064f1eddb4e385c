"""Draw random keys and values for prompts: words that occur in no filler text, names, numbers and dates."""

import datetime
from collections.abc import Callable
from random import Random

from hybridattn.evals.lm_eval.tasks.filler import vocabulary

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def word(rng: Random, syllables: int = 3) -> str:
    """Draw a pronounceable word that does not occur in the filler text."""
    while (drawn := "".join(rng.choices(SYLLABLES, k=syllables))) in vocabulary():
        pass
    return drawn


def name(rng: Random) -> str:
    """Draw a name of two capitalised random words, one of 49 billion."""
    return f"{word(rng, 2).title()} {word(rng, 3).title()}"


def number(rng: Random, digits: int) -> str:
    """Draw a number of exactly ``digits`` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def date(rng: Random) -> str:
    """Draw a day of the 20th century."""
    return (datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(36524))).strftime("%d %B %Y")


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Return ``count`` different results of ``draw``, in the order in which they were drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)
