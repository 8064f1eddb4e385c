"""The metric ``contains`` of BASED and JRT: whether the completion contains the answer, regardless of case."""

from collections.abc import Sequence
from typing import Any


def contains(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the share of a row's answers that the completion contains."""
    return {"contains": sum(found(doc, results)) / len(doc["answers"])}


def contains_any(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the completion contains any of a row's answers, which are alternatives; else 0."""
    return {"contains": float(any(found(doc, results)))}


def found(doc: dict[str, Any], results: Sequence[str]) -> list[bool]:
    """Return for every answer whether the completion contains it."""
    return [answer.lower() in results[0].lower() for answer in doc["answers"]]
