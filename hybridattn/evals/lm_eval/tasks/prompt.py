"""Assemble prompts from context and question, and adjust their length to a number of tokens."""

from collections.abc import Callable, Sequence

FORMS = ("once", "twice", "question_first")
SLACK = 0.02  # a prompt may be shorter than its length by this share, and is never longer


class DoesNotFitError(ValueError):
    """The facts and the question alone exceed the maximum length of the prompt."""


def assemble(context: str, question: str, cloze: str, form: str) -> str:
    """Assemble a prompt that ends with ``cloze``, which the answer completes.

    Args:
        context: the text that contains the answer.
        question: the question as a sentence.
        cloze: the beginning of the answer's sentence.
        form: ``"once"``, context and cloze; ``"twice"``, question, context, context, cloze (JRT-Prompt of Arora et al.,
            "Just read twice", 2024, arXiv:2407.05483); ``"question_first"``, question, context, cloze.

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {list(FORMS)}, got {form!r}")
    parts = {"once": [context], "twice": [question, context, context], "question_first": [question, context]}[form]
    return "\n".join([*parts, cloze])


def place(filler: str, facts: Sequence[tuple[float, str]]) -> str:
    """Insert facts between the lines of a text, each at its depth: 0 is before the first line, 1 after the last."""
    lines = filler.splitlines()
    between: dict[int, list[str]] = {}
    for depth, fact in facts:
        between.setdefault(round(depth * len(lines)), []).append(fact)
    mixed = [line for i in range(len(lines) + 1) for line in (*between.get(i, ()), *lines[i : i + 1])]
    return "\n".join(mixed)


def fit(
    render: Callable[[int], str], count: Callable[[str], int], least: int, most: int, *, step_tokens: float = 1.0
) -> tuple[int, str]:
    """Find a size for which ``render`` gives ``least`` to ``most`` tokens, with few calls at any length.

    Args:
        render: function that returns the text of a size; its number of tokens is about linear in the size.
        count: function that returns the number of tokens of a text.
        least: minimum number of tokens.
        most: maximum number of tokens.
        step_tokens: first estimate of the tokens that a step in size adds.

    Returns:
        The size and its text.

    Raises:
        DoesNotFitError: size 0 has more than ``most`` tokens.
        ValueError: one step in size leads from too few to too many tokens.
    """
    low, text = 0, render(0)
    first = low_tokens = count(text)
    if first > most:
        raise DoesNotFitError(f"length: expected at least {first} tokens for the facts and the question, got {most}")
    aim = (least + 3 * most) / 4
    high, high_tokens = None, 0
    while low_tokens < least:
        wanted = aim - low_tokens
        if high is None:
            rate = max((low_tokens - first) / low, 1e-3) if low else step_tokens
            size = low + max(1, int(wanted / rate))
        elif high - low == 1:
            raise ValueError(f"length: expected {least} to {most} tokens, got {low_tokens} or {high_tokens}")
        else:
            size = low + int((high - low) * wanted / (high_tokens - low_tokens))
            size = min(max(size, low + 1), high - 1)
        candidate = render(size)
        tokens = count(candidate)
        if tokens > most:
            high, high_tokens = size, tokens
        else:
            low, low_tokens, text = size, tokens, candidate
    return low, text
