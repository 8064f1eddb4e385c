"""Recall tasks for lm-eval: YAML files and the data generators that they refer to."""

from pathlib import Path

TASKS = Path(__file__).parent  # lm-eval's include_path
