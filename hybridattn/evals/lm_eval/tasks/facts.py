"""Keys and values that no text knows: drawn words, names, numbers and dates, distinct within a prompt."""

import datetime
from collections.abc import Callable
from random import Random

from hybridattn.evals.lm_eval.tasks.filler import vocabulary

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def word(rng: Random, syllables: int = 3) -> str:
    """A word that can be spoken, none of the filler's."""
    while (drawn := "".join(rng.choices(SYLLABLES, k=syllables))) in vocabulary():
        pass
    return drawn


def name(rng: Random) -> str:
    """Two such words, capitalised: 49 thousand million names."""
    return f"{word(rng, 2).title()} {word(rng, 3).title()}"


def number(rng: Random, digits: int) -> str:
    """A number of exactly ``digits`` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def date(rng: Random) -> str:
    """A day of the 20th century."""
    return (datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(36524))).strftime("%d %B %Y")


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """``count`` different results of ``draw``, in the order they came."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)
