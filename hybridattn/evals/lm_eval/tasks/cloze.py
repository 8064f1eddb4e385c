"""Published cloze forms of question answering, loaded from the Hub: Natural Questions, TriviaQA and DROP.

Rows as in Arora et al., "Just read twice", 2024, arXiv:2407.05483: ``context``, ``question`` (the beginning of a
sentence that the answer ends), ``orig_question`` and ``answers``, any of which counts.
"""

import re
from typing import Any

MARKS = re.compile(r"\[(?:PAR|DOC|TLE)\]")  # of TriviaQA's documents


def context(doc: dict[str, Any]) -> str:
    """The context without the cloze, with which some of the contexts end, and with one full stop at the end."""
    text, cloze = MARKS.sub("", doc["context"]).strip(), doc["question"].strip()
    while cloze and text.lower().endswith(cloze.lower()):
        text = text[: -len(cloze)].strip()
    return text.strip(".").strip() + "."


def once(doc: dict[str, Any]) -> str:
    """The prompt: context and cloze."""
    return f"{context(doc)} {doc['question'].strip()}"


def twice(doc: dict[str, Any]) -> str:
    """JRT-Prompt: question, context, context, cloze."""
    return f"{doc['orig_question'].strip(':')} {context(doc)}\n{once(doc)}"
