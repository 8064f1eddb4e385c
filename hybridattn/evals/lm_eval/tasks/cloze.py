"""Prompts for the published cloze forms of Natural Questions, TriviaQA and DROP, which lm-eval loads from the Hub.

Rows have ``context``, ``question`` (the beginning of a sentence that the answer completes), ``orig_question`` and
``answers``, any of which is correct. Source: Arora et al., "Just read twice", 2024, arXiv:2407.05483.
"""

import re
from typing import Any

MARKS = re.compile(r"\[(?:PAR|DOC|TLE)\]")  # markers in TriviaQA's documents


def context(doc: dict[str, Any]) -> str:
    """Return the context with one full stop at its end and without the cloze, with which some contexts end."""
    text, cloze = MARKS.sub("", doc["context"]).strip(), doc["question"].strip()
    while cloze and text.lower().endswith(cloze.lower()):
        text = text[: -len(cloze)].strip()
    return text.strip(".").strip() + "."


def once(doc: dict[str, Any]) -> str:
    """Return the prompt: context and cloze."""
    return f"{context(doc)} {doc['question'].strip()}"


def twice(doc: dict[str, Any]) -> str:
    """Return the JRT-Prompt: question, context, context, cloze."""
    return f"{doc['orig_question'].strip(':')} {context(doc)}\n{once(doc)}"
