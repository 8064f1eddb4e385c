"""Recall tasks for lm-eval: YAML files and the generators that they name."""

from pathlib import Path

TASKS = Path(__file__).parent  # lm-eval's include_path
