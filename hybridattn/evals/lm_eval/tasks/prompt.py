"""How context and question are put together, and how a prompt is brought to its length in tokens."""

from collections.abc import Callable, Sequence

FORMS = ("once", "twice", "question_first")
SLACK = 0.02  # a prompt may be shorter than asked by this share, and is never longer


class DoesNotFitError(ValueError):
    """The facts and the question alone are longer than the prompt may be."""


def assemble(context: str, question: str, cloze: str, form: str) -> str:
    """The prompt, which ends with ``cloze``, to be completed by the answer.

    Args:
        context: the text that holds the answer.
        question: what will be asked, as a sentence.
        cloze: the beginning of the answer's sentence.
        form: ``"once"``, context and cloze; ``"twice"``, question, context, context, cloze (JRT-Prompt of Arora et al.,
            "Just read twice", 2024, arXiv:2407.05483); ``"question_first"``, question, context, cloze.

    Raises:
        ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {list(FORMS)}, got {form!r}")
    parts = {"once": [context], "twice": [question, context, context], "question_first": [question, context]}[form]
    return "\n".join([*parts, cloze])


def place(filler: str, facts: Sequence[tuple[float, str]]) -> str:
    """Put lines between the lines of a text, each at its depth: 0 is before the first one, 1 after the last one."""
    lines = filler.splitlines()
    between: dict[int, list[str]] = {}
    for depth, fact in facts:
        between.setdefault(round(depth * len(lines)), []).append(fact)
    mixed = [line for i in range(len(lines) + 1) for line in (*between.get(i, ()), *lines[i : i + 1])]
    return "\n".join(mixed)


def fit(
    render: Callable[[int], str], count: Callable[[str], int], least: int, most: int, *, step_tokens: float = 1.0
) -> tuple[int, str]:
    """Find a size whose text has ``least`` to ``most`` tokens; texts are measured whole, a few of them at any length.

    Args:
        render: the text of a size; its tokens grow about linearly with the size.
        count: tokens of a text.
        least: tokens that are enough.
        most: tokens that are never exceeded.
        step_tokens: a guess of the tokens that one more step adds, from which the search starts.

    Returns:
        The size and its text.

    Raises:
        DoesNotFitError: even size 0 has too many tokens.
        ValueError: one step in size leads from too few tokens to too many.
    """
    low, text = 0, render(0)
    first = low_tokens = count(text)
    if first > most:
        raise DoesNotFitError(f"length: expected at least {first} tokens, for the facts and the question, got {most}")
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
