"""The metric ``contains``: the answer stands somewhere in the completion, in any case, as BASED and JRT count it."""

from collections.abc import Sequence
from typing import Any


def contains(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of a row's answers that the completion holds."""
    return {"contains": sum(found(doc, results)) / len(doc["answers"])}


def contains_any(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the completion holds one of a row's answers, which are ways to say the same; else 0."""
    return {"contains": float(any(found(doc, results)))}


def found(doc: dict[str, Any], results: Sequence[str]) -> list[bool]:
    """Of every answer, whether the completion holds it."""
    return [answer.lower() in results[0].lower() for answer in doc["answers"]]
